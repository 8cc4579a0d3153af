"""Batch norm of GELU in one pass: operators of the CPU for the feed-forward network.

With ``s = GELU(x) + residual`` over rows of channels, (N, C) each:

- ``gelu_statistics`` returns the mean and the biased variance of s, (C,) each.
- ``gelu_norm`` returns ``scale * s + shift``, ``gelu_norm_`` puts it into x.
- ``gelu_norm_backward`` takes the gradient of ``weight * (s - mean) * inverse_std +
  bias``, or that and ``more`` to be added to it, puts the gradient of x in its place
  and returns those of the residual, weight and bias. The first of them is empty if
  there is no residual.

Nothing but x and the residual has to be kept for it: s is cheaper to compute again
than to read from memory. C must be a multiple of 16; numbers by channel are float32,
float64 with float64 rows.
"""

import torch
from torch import Tensor

from . import functional
from .library import NAMESPACE

ops = torch.ops.mmdgt
CHANNEL_STEP = 16

_library = torch.library.Library(NAMESPACE, 'FRAGMENT')


def _define(name: str, schema: str, fake) -> None:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f'{NAMESPACE}::{name}', fake, lib=_library)


def _by_channel(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[1], dtype=dtype)


_define(
    'gelu_statistics',
    '(Tensor x, Tensor? residual) -> (Tensor mean, Tensor var)',
    lambda x, residual: (_by_channel(x), _by_channel(x)),
)
_define(
    'gelu_norm',
    '(Tensor x, Tensor? residual, Tensor scale, Tensor shift) -> Tensor',
    lambda x, residual, scale, shift: torch.empty_like(x),
)
_define(
    'gelu_norm_',
    '(Tensor(a!) x, Tensor? residual, Tensor scale, Tensor shift) -> ()',
    lambda x, residual, scale, shift: None,
)
_define(
    'gelu_norm_backward',
    '(Tensor(a!) grad, Tensor? more, Tensor x, Tensor? residual, Tensor mean,'
    ' Tensor inverse_std, Tensor weight)'
    ' -> (Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)',
    lambda grad, more, x, residual, *_: (
        x.new_empty(0) if residual is None else torch.empty_like(x),
        _by_channel(x),
        _by_channel(x),
    ),
)


def serves(x: Tensor) -> bool:
    """Whether the kernels take a feature map (B, C, H, W) such as x, here and now.

    A compiler fuses by itself, and an exported network holds no operators of ours
    that a runtime does not know.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == 'cpu'
        and functional.fused('gelu_norm', x)
        and x.shape[1] % CHANNEL_STEP == 0
        and x.numel() > 0
    )
