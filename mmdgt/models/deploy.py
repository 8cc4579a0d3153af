"""What inference spares: batch norms and sums folded into their neighbours.

In evaluation mode a batch norm is a factor and a shift per channel. A 1x1
convolution beside it takes both over. A 3x3 convolution behind it does not: it pads
with zeros, which stand for what the norm would have returned. There the factor and
the shift remain, applied in place.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from .convolutions import DepthwiseConv, ResidualDepthwiseConv


def factor_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a batch norm of C channels is in evaluation mode, (C,) each."""
    scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias.detach() - norm.running_mean * scale


class Affine(nn.Module):
    """A batch norm in evaluation mode, applied in place.

    Args:
        norm (nn.Module): A batch norm of C channels with running statistics.

    Raises:
        TypeError: If the norm is of another kind.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            raise TypeError(
                f'only batch norms can be folded, got {type(norm).__name__}; use the'
                ' model without switch_to_deploy'
            )
        scale, shift = factor_and_shift(norm)
        self.register_buffer('scale', scale)
        self.register_buffer('shift', shift)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same tensor."""
        # New memory for a large map costs more than the arithmetic.
        tokens = x.permute(0, 2, 3, 1)
        torch.addcmul(self.shift, tokens, self.scale, out=tokens)
        return x


def fold_norms(before: nn.Module, conv: nn.Conv2d, after: nn.Module) -> nn.Conv2d:
    """One 1x1 convolution that equals a batch norm, a 1x1 convolution, a batch norm."""
    affine = Affine(before)
    folded = fuse_conv_bn_eval(conv.eval(), after.eval())
    folded.bias = nn.Parameter(folded.bias + folded.weight.flatten(1) @ affine.shift)
    folded.weight = nn.Parameter(folded.weight * affine.scale.view(-1, 1, 1))
    return folded


def fold_sum(conv: ResidualDepthwiseConv) -> DepthwiseConv:
    """One convolution that equals ``x + conv(x)``."""
    folded = DepthwiseConv(conv.in_channels).to(conv.weight)
    folded.weight = nn.Parameter(conv.kernel().detach())
    folded.bias = conv.bias
    return folded
