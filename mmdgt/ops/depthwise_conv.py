"""Depth-wise 3x3 convolutions of maps stored channels last, by kernels of the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import backend
from .library import NAMESPACE

ops = torch.ops.mmdgt

_library = torch.library.Library(NAMESPACE, 'FRAGMENT')
for _name, _schema, _fake in (
    (
        'depthwise_conv',
        '(Tensor x, Tensor weight, Tensor bias) -> Tensor',
        lambda x, *_: torch.empty_like(x),
    ),
    (
        'depthwise_conv_backward',
        '(Tensor grad, Tensor x, Tensor weight)'
        ' -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)',
        lambda grad, x, weight: (
            torch.empty_like(x),
            torch.empty_like(weight),
            weight.new_empty(weight.shape[0]),
        ),
    ),
):
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f'{NAMESPACE}::{_name}', _fake, lib=_library)


def _save_for_backward(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    grad = grad.contiguous(memory_format=torch.channels_last)
    return ops.depthwise_conv_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd(
    f'{NAMESPACE}::depthwise_conv',
    _backward,
    setup_context=_save_for_backward,
    lib=_library,
)


# Two for each multiply-add, as torch counts.
@register_flop_formula(ops.depthwise_conv)
def _flops(x_shape, *_, **__) -> int:
    return 2 * 9 * x_shape.numel()


@register_flop_formula(ops.depthwise_conv_backward)
def _backward_flops(grad_shape, *_, **__) -> int:
    return 4 * 9 * grad_shape.numel()


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=1, groups=C)``, in x's data type.

    By kernels where they serve; those of PyTorch's libraries take several times as long
    as the maps take to be read and written. Autocast leaves x as it is: rounding a
    residual stream to half precision would cost more than it saves.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): (C, 1, 3, 3).
        bias (Tensor): (C,).

    Returns:
        Tensor: (B, C, H, W).
    """
    if (
        x.device.type == 'cpu'
        and backend.channels_served('depthwise_conv', x, x.shape[1])
        and not torch.jit.is_tracing()  # tracers count the operators that they know
    ):
        x = x.contiguous(memory_format=torch.channels_last)
        return ops.depthwise_conv(x, weight, bias)
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    with backend.without_autocast(x):
        return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
