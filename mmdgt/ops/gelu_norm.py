"""Batch norm of GELU in one pass: operators of the CPU for the feed-forward network.

With ``s = GELU(x) + residual`` over rows of channels, (N, C) each:

- ``gelu_statistics`` returns the mean and the biased variance of s, (C,) each. The
  residual, if there is one, becomes s.
- ``gelu_norm`` returns ``scale * s + shift``, ``gelu_norm_`` puts it into x.

And back, for ``y = scale * s + shift`` whose scale and shift come from s's statistics:

- ``gelu_norm_sums`` returns the sums over the rows of grad, y's gradient, and of
  ``grad * (s - mean)``, (C,) each, of an s without a residual. If there is ``more``, it
  is added to grad first.
- ``gelu_norm_backward_`` puts ``scale * grad + slope * s + shift``, the gradient of s,
  into s, and that of x into grad. Without an s it is GELU(x).

Nothing but the inputs of the GELUs has to be kept for that: s is cheaper to compute
again than to read from memory. C must be a multiple of 16; numbers by channel are
float32, float64 with float64 rows.
"""

import torch
from torch import Tensor

from . import backend
from .library import NAMESPACE

ops = torch.ops.mmdgt

_library = torch.library.Library(NAMESPACE, 'FRAGMENT')


def _define(name: str, schema: str, fake) -> None:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f'{NAMESPACE}::{name}', fake, lib=_library)


def _by_channel(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[1], dtype=dtype)


_define(
    'gelu_statistics',
    '(Tensor x, Tensor(a!)? residual) -> (Tensor mean, Tensor var)',
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
    'gelu_norm_sums',
    '(Tensor(a!) grad, Tensor? more, Tensor x, Tensor mean)'
    ' -> (Tensor sum, Tensor product)',
    lambda grad, more, x, mean: (_by_channel(x), _by_channel(x)),
)
_define(
    'gelu_norm_backward_',
    '(Tensor(a!) grad, Tensor x, Tensor(b!)? s, Tensor scale, Tensor slope,'
    ' Tensor shift) -> ()',
    lambda *_: None,
)


def serves(x: Tensor) -> bool:
    """Whether the kernels take a feature map (B, C, H, W) such as x, here and now."""
    return x.device.type == 'cpu' and backend.channels_served(
        'gelu_norm', x, x.shape[1]
    )
