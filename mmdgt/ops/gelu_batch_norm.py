"""Batch norm of GELU in one function, by operators of the CPU.

Over feature maps (B, C, H, W) stored channels last, of a C that 16 divides; numbers by
channel, (C,) each, are float32, float64 with float64 maps. With ``s = GELU(x)``:

- ``gelu_batch_norm_stats`` returns the mean and the biased variance of s.
- ``gelu_batch_norm_elemt`` returns ``scale * s + shift``; with an underscore it puts
  that into x.
- ``gelu_batch_norm_backward_reduce`` returns the sums over all pixels of grad, y's
  gradient, and of ``grad * (s - mean)``.
- ``gelu_batch_norm_backward_elemt`` returns x's gradient if that of s is
  ``scale * grad + slope * s + shift``.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend
from .library import NAMESPACE

ops = torch.ops.mmdgt

_library = torch.library.Library(NAMESPACE, 'FRAGMENT')


def _by_channel(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


for _name, _schema, _fake in (
    ('stats', '(Tensor x) -> (Tensor mean, Tensor var)', _by_channel),
    (
        'elemt',
        '(Tensor x, Tensor scale, Tensor shift) -> Tensor',
        lambda x, *_: torch.empty_like(x),
    ),
    ('elemt_', '(Tensor(a!) x, Tensor scale, Tensor shift) -> ()', lambda *_: None),
    (
        'backward_reduce',
        '(Tensor grad, Tensor x, Tensor mean) -> (Tensor sum_dy, Tensor sum_dy_xmu)',
        _by_channel,
    ),
    (
        'backward_elemt',
        '(Tensor grad, Tensor x, Tensor scale, Tensor slope, Tensor shift) -> Tensor',
        lambda grad, x, *_: torch.empty_like(x),
    ),
):
    _name = f'gelu_batch_norm_{_name}'
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f'{NAMESPACE}::{_name}', _fake, lib=_library)


def serves(x: Tensor) -> bool:
    """Whether the kernels take a feature map (B, C, H, W) such as x, here and now."""
    return x.device.type == 'cpu' and backend.channels_served(
        'gelu_batch_norm_elemt', x, x.shape[1]
    )


def gelu_batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    """``y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias`` with ``s = GELU(x)``.

    ``F.batch_norm(F.gelu(x), ..., training=True)`` that keeps x alone for the gradients
    and computes s again, which is cheaper than reading it from memory. The statistics
    are those of each channel's N = B H W numbers.

    Args:
        x (Tensor): (B, C, H, W) with N > 1, as :func:`serves` takes it.
        running_mean (Tensor): (C,), moved by ``momentum`` towards the mean.
        running_var (Tensor): (C,), moved towards the unbiased variance.
        weight, bias (Tensor): (C,).
        momentum (float): Share of this batch in the running statistics.
        eps (float): Added to the variance.

    Returns:
        Tensor: (B, C, H, W), stored channels last.
    """
    return _GELUBatchNorm.apply(
        x, running_mean, running_var, weight, bias, momentum, eps
    )


class _GELUBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, running_mean, running_var, weight, bias, momentum, eps):
        x = x.contiguous(memory_format=torch.channels_last)
        mean, var = ops.gelu_batch_norm_stats(x)
        count = x.numel() // x.shape[1]
        for running, now in (
            (running_mean, mean),
            (running_var, var * (count / (count - 1))),
        ):
            running.lerp_(now.to(running.dtype), momentum)
        weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
        inverse_std = (var + eps).rsqrt()
        scale = weight * inverse_std
        ctx.save_for_backward(x, mean, inverse_std, scale)
        return ops.gelu_batch_norm_elemt(x, scale, bias - mean * scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, inverse_std, scale = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        sum_dy, sum_dy_xmu = ops.gelu_batch_norm_backward_reduce(grad, x, mean)
        grad_weight = sum_dy_xmu * inverse_std
        # With n = (s - mean) * inverse_std, whose mean is 0 and whose mean square is 1,
        # ds = scale * (dy - mean(dy) - n * mean(dy * n)).
        count = x.numel() // x.shape[1]
        slope = scale * inverse_std * grad_weight / -count
        shift = scale * sum_dy / -count - slope * mean
        grad_x = ops.gelu_batch_norm_backward_elemt(grad, x, scale, slope, shift)
        return grad_x, None, None, grad_weight, sum_dy, None, None


def gelu_affine_(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale * GELU(x) + shift``, a batch norm in evaluation mode, in x's place.

    Args:
        x (Tensor): (B, C, H, W), as :func:`serves` takes it; overwritten if it is
            stored channels last.
        scale, shift (Tensor): (C,).

    Returns:
        Tensor: (B, C, H, W), stored channels last.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    dtype = torch.promote_types(x.dtype, torch.float32)
    ops.gelu_batch_norm_elemt_(x, scale.to(dtype), shift.to(dtype))
    return x
