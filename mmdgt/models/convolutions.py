"""Convolutions of the network that are more, or less, than ``nn.Conv2d``."""

import torch.nn.functional as F
from torch import Tensor, nn

from .layout import feature_map, tokens


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution, (B, C, H, W) -> (B, out_channels, H, W).

    The libraries of convolutions bring its weights into an order of their own
    whenever it is called. With few pixels for the channels that is most of the work,
    which a linear layer does not have.
    """
    if not _is_linear(x, weight):
        return F.conv2d(x, weight, bias)
    return feature_map(F.linear(tokens(x), weight.flatten(1), bias))


def _is_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution had better be a linear layer."""
    return weight.shape[2:].numel() == 1 and x[:, 0].numel() <= x.shape[1]


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution by :func:`pointwise`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H, W)."""
        return pointwise(x, self.weight, self.bias)


class ResidualDepthwiseConv(nn.Conv2d):
    """``x + conv(x)`` for a depth-wise 3x3 convolution, as one convolution.

    Weights and their names are those of ``conv``; the sum is one more in the centre
    of every kernel, and no second pass over the maps.
    """

    def __init__(self, dims: int) -> None:
        super().__init__(dims, dims, 3, padding=1, groups=dims)

    def kernel(self) -> Tensor:
        """The weights (C, 1, 3, 3) of the one convolution."""
        return self.weight + F.pad(self.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self._conv_forward(x, self.kernel(), self.bias)
