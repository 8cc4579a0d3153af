"""What inference spares: batch norms folded into their neighbours.

In evaluation mode a batch norm is a factor and a shift per channel. A 1x1
convolution beside it takes both over. A 3x3 convolution behind it does not: it pads
with zeros, which stand for what the norm would have returned. There the factor and
the shift remain, applied in place.
"""

from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn

from .convolutions import PointwiseConv
from .layout import tokens


class BatchNorm(Protocol):
    """A batch norm of C channels with weights and running statistics, (C,) each."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float | None
    eps: float


def is_batch_norm(norm: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether a norm is a batch norm with weights, biases and running statistics."""
    stock = nn.modules.batchnorm._BatchNorm
    return isinstance(norm, stock) and norm.affine and norm.track_running_stats


def factor_and_shift(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """What a batch norm of C channels is in evaluation mode, (C,) each."""
    scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias.detach() - norm.running_mean * scale


class Affine(nn.Module):
    """A batch norm in evaluation mode, applied in place.

    Args:
        norm (nn.Module): A batch norm of C channels, as :func:`is_batch_norm` has it.

    Raises:
        TypeError: If the norm is of another kind.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        if not is_batch_norm(norm):
            raise TypeError(
                'only batch norms with weights and running statistics can be folded,'
                f' got {norm}; use the model without switch_to_deploy'
            )
        scale, shift = factor_and_shift(norm)
        self.register_buffer('scale', scale)
        self.register_buffer('shift', shift)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same tensor."""
        # New memory for a large map costs more than the arithmetic.
        rows = tokens(x)
        torch.addcmul(self.shift, rows, self.scale, out=rows)
        return x


def fold_norms(
    before: nn.Module, conv: PointwiseConv, after: nn.Module
) -> PointwiseConv:
    """One 1x1 convolution that equals a batch norm, a 1x1 convolution, a batch norm."""
    first, last = Affine(before), Affine(after)
    weight = last.scale[:, None] * conv.weight.flatten(1)
    bias = last.scale * conv.bias + last.shift + weight @ first.shift
    folded = PointwiseConv(conv.in_channels, conv.out_channels)
    folded.weight = nn.Parameter((weight * first.scale)[:, :, None, None])
    folded.bias = nn.Parameter(bias)
    return folded
