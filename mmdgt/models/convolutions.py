"""Convolutions of the feed-forward network, forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import feature_map, rows, shaped, tokens


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


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A padded depth-wise 3x3 convolution, (B, C, H, W) -> (B, C, H, W)."""
    return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias of a 1x1 or a depth-wise 3x3 convolution."""
    if _is_linear(x, weight):
        g = rows(grad)
        grad_x = shaped(g @ weight.flatten(1), x)
        return grad_x, (g.mT @ rows(x)).view_as(weight), g.sum(0)
    groups = x.shape[1] // weight.shape[1]
    padding = [side // 2 for side in weight.shape[2:]]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        bias_sizes=[weight.shape[0]],
        stride=[1, 1],
        padding=padding,
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=groups,
        output_mask=[True, True, True],
    )
    grad_x = grad_x.contiguous(memory_format=torch.channels_last)
    return grad_x, grad_weight, grad_bias
