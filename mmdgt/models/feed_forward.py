"""The feed-forward network of a DGT block."""

from collections.abc import Callable

from torch import Tensor, nn

from .convolutions import PointwiseConv, ResidualDepthwiseConv
from .deploy import Affine, fold_norms, fold_sum
from .gelu_norm import norm_of_gelu


class IRFFN(nn.Module):
    """Inverted residual feed-forward network of CMT (Guo et al., 2021).

    As the authors' code has it, the sum is within the GELU::

        x = norm1(GELU(expand(x)))
        x = norm2(GELU(x + depthwise(x)))
        x = norm3(reduce(x))

    Args:
        dims (int): Channels in and out.
        ratio (int): Hidden channels over ``dims``.
        norm_layer (Callable): Builds the norm of a map with so many channels.
    """

    def __init__(
        self,
        dims: int,
        ratio: int,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        hidden = dims * ratio
        self.expand = PointwiseConv(dims, hidden)
        self.norm1 = norm_layer(hidden)
        self.depthwise = ResidualDepthwiseConv(hidden)
        self.norm2 = norm_layer(hidden)
        self.reduce = PointwiseConv(hidden, dims)
        self.norm3 = norm_layer(dims)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = norm_of_gelu(self.norm1, self.expand(x))
        x = norm_of_gelu(self.norm2, self.depthwise(x))
        return self.norm3(self.reduce(x))

    def switch_to_deploy(self) -> None:
        """Fold the batch norms and the sum."""
        self.reduce = fold_norms(self.norm2, self.reduce, self.norm3)
        self.depthwise = fold_sum(self.depthwise)
        self.norm1 = Affine(self.norm1)  # before a zero-padded convolution
        self.norm2 = self.norm3 = nn.Identity()
