"""What DGT is made of: stem, patch merging, blocks (sections 3.2 and 3.3)."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from .checkpointing import checkpointed
from .convolutions import ResidualDepthwiseConv
from .feed_forward import IRFFN
from .gelu_norm import conv_of_norm, norm_of_gelu
from .layout import feature_map, tokens

Layer = Callable[[int], nn.Module]  # makes a layer of so many channels


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a feature map."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return feature_map(super().forward(tokens(x)))


class Stem(nn.Sequential):
    """Three 3x3 convolutions, the first of stride 2, each with GELU and norm."""

    def __init__(self, in_channels: int, dims: int, norm_layer: Layer) -> None:
        layers: list[nn.Module] = []
        for stride in (2, 1, 1):
            layers += [
                nn.Conv2d(in_channels, dims, 3, stride=stride, padding=1),
                nn.GELU(),
                norm_layer(dims),
            ]
            in_channels = dims
        super().__init__(*layers)
        convert_conv2d_weight_memory_format(self, torch.channels_last)  # as the maps

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, dims, ceil(H / 2), ceil(W / 2))."""
        # Channels last, tokens are views of feature maps and nothing is copied.
        x = x.contiguous(memory_format=torch.channels_last)
        conv1, _, norm1, conv2, _, norm2, conv3, _, norm3 = self
        x = conv_of_norm(conv2, norm1, conv1(x))
        return norm_of_gelu(norm3, conv_of_norm(conv3, norm2, x))


class PatchMerging(nn.Sequential):
    """A 3x3 convolution of stride 2 and a LayerNorm."""

    def __init__(self, in_channels: int, dims: int) -> None:
        conv = nn.Conv2d(in_channels, dims, 3, stride=2, padding=1)
        super().__init__(conv, LayerNorm2d(dims))
        convert_conv2d_weight_memory_format(self, torch.channels_last)  # as the maps


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016) per image.

    Args:
        drop_prob (float): Share of images for which a training pass drops the branch;
            the others are scaled by ``1 / (1 - drop_prob)``.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


class Block(nn.Module):
    """CPE, attention and IRFFN, eqs. 8 to 10.

    Args:
        dims (int): Channels C.
        attention (nn.Module): Maps (B, H, W, C) to (B, H, W, C).
        ffn_ratio (int): Hidden channels of the IRFFN over C.
        post_norm (bool): Whether LayerNorm comes after attention and IRFFN
            (DGT-S, DGT-B) instead of before (DGT-T).
        drop_path (nn.Module): Stochastic depth.
        norm_layer (Callable): Makes the norms inside the IRFFN of their channels.
        with_cp (bool): Whether to trade compute for memory by checkpointing.
    """

    def __init__(
        self,
        dims: int,
        attention: nn.Module,
        ffn_ratio: int,
        post_norm: bool,
        drop_path: nn.Module,
        norm_layer: Layer,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.cpe = ResidualDepthwiseConv(dims)
        self.norm1 = LayerNorm2d(dims)
        self.attention = attention
        self.norm2 = LayerNorm2d(dims)
        self.irffn = IRFFN(dims, ffn_ratio, norm_layer)
        self.drop_path = drop_path
        self.post_norm = post_norm
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.with_cp and torch.is_grad_enabled():
            return checkpointed(self, self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = self.cpe(x)  # eq. 8: conditional positional encoding, added
        if self.post_norm:
            x = x + self.drop_path(self.norm1(self._attend(x)))
            return x + self.drop_path(self.norm2(self.irffn(x)))
        x = x + self.drop_path(self._attend(self.norm1(x)))  # eq. 9
        return x + self.drop_path(self.irffn(self.norm2(x)))  # eq. 10

    def _attend(self, x: Tensor) -> Tensor:
        return feature_map(self.attention(tokens(x)))

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        refuse_old_weights(state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)


def refuse_old_weights(keys: Iterable[str]) -> None:
    """Raise a ValueError if weights are those of another feed-forward network.

    Up to November 2026 it was ``ffn`` and added behind its GELU, not before: with
    the same shapes the weights would compute something else.
    """
    if any(re.match(r'(.*\.)?ffn\.(expand|depthwise|reduce)\.', key) for key in keys):
        raise ValueError(
            'these weights were trained with an older mmdgt, whose IRFFN computed'
            ' BN(GELU(dw(y)) + y) instead of BN(GELU(dw(y) + y)) of its authors'
            ' (docs/changelog.md), and have no use here: train anew, or install the'
            ' mmdgt that they were trained with'
        )


class Stage(nn.Module):
    """A patch merging layer and the blocks behind it."""

    def __init__(self, in_channels: int, dims: int, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.merge = PatchMerging(in_channels, dims)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dims, ceil(H / 2), ceil(W / 2))."""
        return self.blocks(self.merge(x))
