"""DG-Attention in mmengine's FLOP counter, and the FLOPs of whole models.

And so in the ``tools/analysis_tools/get_flops.py`` of the frameworks.
"""

from typing import Any

import torch
from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import get_shape
from mmengine.model import BaseModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ...ops.library import FLOP_FORMULAS, NAMESPACE


def register_flop_counters() -> None:
    """Count DG-Attention by eq. 6 and fused attention by its two products.

    mmengine counts one multiply-add as one, torch as two.
    """
    counted = complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS
    forward = ('assign_queries', 'select_keys', 'group_attention', 'choose_and_attend')
    for name in forward:
        counted.setdefault(f'{NAMESPACE}::{name}', _multiply_adds(FLOP_FORMULAS[name]))
    counted.setdefault('aten::scaled_dot_product_attention', _count_dense_attention)


def _multiply_adds(formula: Any) -> Any:
    def handle(inputs: list, outputs: list) -> int:
        # A tensor by its shape, a number such as K as it is.
        return formula(*(get_shape(x) or x.toIValue() for x in inputs)) // 2

    return handle


def _count_dense_attention(inputs: list, outputs: list) -> int:
    B, H, L, D = get_shape(inputs[0])
    return 2 * B * H * L * get_shape(inputs[1])[2] * D


def count_flops(model: BaseModel, height: int, width: int) -> dict[str, float]:
    """Count the multiply-adds of a segmentor or a detector for one image.

    Models with proposals are counted as published figures are: 1000 proposals get a
    box, by every head of a cascade, the 100 best of them a mask. Mask2Former cannot
    be counted: its deformable attention needs values, not shapes alone.

    Args:
        model (BaseModel): In evaluation mode, on the device "meta": the count
            follows from shapes, and nothing is computed.
        height, width (int): Of the image, in pixels.

    Returns:
        dict: The multiply-adds by the operator, such as 'aten.convolution'.
    """
    image = torch.empty(1, 3, height, width, device='meta')
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if hasattr(model, 'roi_head'):
            model.rpn_head(model.extract_feat(image))
            for heads, shape in (
                (model.roi_head.bbox_head, (1000, 256, 7, 7)),
                (model.roi_head.mask_head, (100, 256, 14, 14)),
            ):
                cascade = heads if isinstance(heads, nn.ModuleList) else [heads]
                for one in cascade:
                    one(torch.empty(shape, device='meta'))
        else:
            model(image, mode='tensor')
    counted = counter.get_flop_counts()['Global']
    # torch counts two for each multiply-add
    return {str(operator): flops / 2 for operator, flops in counted.items()}
