"""DG-Attention in mmengine's FLOP counter.

And so in the ``tools/analysis_tools/get_flops.py`` of the frameworks.
"""

from typing import Any

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import get_shape

from ..ops.library import FLOP_FORMULAS, NAMESPACE


def register_flop_counters() -> None:
    """Count DG-Attention by eq. 6 and fused attention by its two products.

    mmengine counts one multiply-add as one, torch as two.
    """
    counted = complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS
    for name in ('assign_queries', 'select_keys', 'group_attention'):
        counted.setdefault(f'{NAMESPACE}::{name}', _multiply_adds(FLOP_FORMULAS[name]))
    counted.setdefault('aten::scaled_dot_product_attention', _count_dense_attention)


def _multiply_adds(formula: Any) -> Any:
    def handle(inputs: list, outputs: list) -> int:
        return formula(*map(get_shape, inputs)) // 2

    return handle


def _count_dense_attention(inputs: list, outputs: list) -> int:
    B, H, L, D = get_shape(inputs[0])
    return 2 * B * H * L * get_shape(inputs[1])[2] * D
