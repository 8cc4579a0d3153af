"""The feed-forward network of a DGT block."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .checkpointing import checkpointed
from .convolutions import PointwiseConv, ResidualDepthwiseConv
from .deploy import Affine, fold_norms, fold_sum
from .gelu_norm import norm_of_gelu, trains_fused


class IRFFN(nn.Module):
    """Inverted residual feed-forward network of CMT (Guo et al., 2021).

    As the authors' code has it, the sum is within the GELU::

        x = norm1(GELU(expand(x)))
        x = norm2(GELU(x + depthwise(x)))
        x = norm3(reduce(x))

    Args:
        dims (int): Channels in and out.
        ratio (int): Hidden channels over ``dims``.
        norm_layer (Callable): Makes the norms of their channels.
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
        x = self.expand(x)
        if torch.is_grad_enabled() and trains_fused(self.norm1, x):
            # One wide map is kept for the gradients instead of four.
            x = checkpointed(self, self._mix, x)
        else:
            x = self._mix(x)
        return self.norm3(x)

    def _mix(self, x: Tensor) -> Tensor:
        x = norm_of_gelu(self.norm1, x)
        x = norm_of_gelu(self.norm2, self.depthwise(x))
        return self.reduce(x)

    def switch_to_deploy(self) -> None:
        """Fold the batch norms and the sum."""
        self.reduce = fold_norms(self.norm2, self.reduce, self.norm3)
        self.depthwise = fold_sum(self.depthwise)
        self.norm1 = Affine(self.norm1)  # before a zero-padded convolution
        self.norm2 = self.norm3 = nn.Identity()
