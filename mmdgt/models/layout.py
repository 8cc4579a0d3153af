"""The same numbers as maps or as tokens: views, where maps are channels last."""

from torch import Tensor


def tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), a view where x is stored channels last."""
    return x.permute(0, 2, 3, 1)


def feature_map(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W)."""
    return x.permute(0, 3, 1, 2)
