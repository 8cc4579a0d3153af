"""The same numbers as maps, tokens or rows: views, where maps are channels last."""

from torch import Tensor


def tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), a view where x is stored channels last."""
    return x.permute(0, 2, 3, 1)


def feature_map(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B * H * W, C), a view where x is stored channels last."""
    return tokens(x).flatten(0, 2).contiguous()


def shaped(rows: Tensor, like: Tensor) -> Tensor:
    """(B * H * W, C) -> (B, C, H, W) of the other's B, H and W."""
    B, _, H, W = like.shape
    return feature_map(rows.view(B, H, W, -1))
