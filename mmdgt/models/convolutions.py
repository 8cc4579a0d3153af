"""Convolutions of the network that are more, or less, than ``nn.Conv2d``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.backend import without_autocast
from .layout import feature_map, tokens


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, as a linear layer where that is faster.

    The libraries of convolutions bring its weights into an order of their own whenever
    it is called. With few pixels for the channels that is most of the work, and their
    gradients take longer than the same matrix products. A linear layer in turn copies
    its bias to every pixel first.
    """

    bias: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H, W)."""
        few_pixels = x[:, 0].numel() <= x.shape[1]
        if not (few_pixels or torch.is_grad_enabled()):
            return super().forward(x)
        weight = self.weight.flatten(1)
        return feature_map(F.linear(tokens(x), weight, self.bias))


class ResidualDepthwiseConv(nn.Conv2d):
    """``x + conv(x)`` for a depth-wise 3x3 convolution, as one convolution.

    Weights and their names are those of ``conv``; the sum is one more in the centre
    of every kernel, and no second pass over the maps. Autocast leaves x as it is:
    rounding a residual stream to half precision would cost more than it saves.
    """

    bias: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__(dims, dims, 3, padding=1, groups=dims)

    def kernel(self) -> Tensor:
        """The weights (C, 1, 3, 3) of the one convolution."""
        return self.weight + F.pad(self.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        with without_autocast(x):
            weight, bias = self.kernel().to(x.dtype), self.bias.to(x.dtype)
            return self._conv_forward(x, weight, bias)
