"""The attention layers of DGT: Dynamic Group Attention and global attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import dynamic_group_attention

MAX_LOGIT_SCALE = 100.0  # of Swin Transformer V2, which starts at 10
NUDGE = 0.1  # how far a split-off centroid stands from the one it splits


class GlobalAttention(nn.Module):
    """Multi-head self-attention over all tokens.

    Args:
        dims (int): Channels C, divisible by the heads.
        num_heads (int): Heads H.
        cosine (bool): Whether scores are cosines times a learned factor per head,
            at most 100 (Swin Transformer V2), instead of dot products times
            ``D ** -0.5``.
    """

    def __init__(self, dims: int, num_heads: int, cosine: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dims, 3 * dims)
        self.proj = nn.Linear(dims, dims)
        self.logit_scale = None
        if cosine:
            start = torch.full((num_heads, 1, 1), math.log(10.0))
            self.logit_scale = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) -> (B, ..., C), the tokens in one dimension or two."""
        return self.join(self.attend(*self.project(x)), x.shape)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, float | None]:
        """(B, ..., C) -> what :meth:`attend` takes."""
        return self.split(*self.qkv(x.flatten(1, -2)).chunk(3, dim=-1))

    def split(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, float | None]:
        """(B, L, C) each -> (B, H, L, D) each, and the scale of the scores."""
        # Views of one projection; the operators read them where they are. Of all ways
        # to take them, this one makes a single copy of their gradients.
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in (query, key, value)
        )
        if self.logit_scale is None:
            return query, key, value, None
        factor = self.logit_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp()
        query = (F.normalize(query, dim=-1) * factor).to(value.dtype)
        key = F.normalize(key, dim=-1).to(value.dtype)
        return query, key, value, 1.0

    def join(self, out: Tensor, shape: torch.Size) -> Tensor:
        """(B, H, L, D) -> (B, ..., C), the shape, through the last projection."""
        return self.proj(out.transpose(1, 2).flatten(2)).view(shape)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Tensor:
        """(B, H, L, D) each -> (B, H, L, D)."""
        return F.scaled_dot_product_attention(query, key, value, scale=scale)


class DynamicGroupAttention(GlobalAttention):
    """Dynamic Group Attention (DG-Attention), section 3.1 of the paper.

    The centroids are a buffer, (H, G, D) unit vectors in float32. A training
    forward pass leaves the terms of eq. 3 in ``group_sums`` and ``group_counts``,
    :func:`update_centroids` applies eq. 4 once the iteration is over. So every
    pass of an iteration, a recomputation under activation checkpointing too, sees
    the same centroids, and nothing is counted twice.

    Args:
        dims (int): Channels C, divisible by the heads.
        num_heads (int): Heads H.
        num_groups (int): Groups G.
        num_keys (int): Keys K that every group attends to, clamped to the tokens.
        cosine (bool): As in :class:`GlobalAttention`. The key is normalised before
            it is scored by the centroids.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        num_groups: int = 48,
        num_keys: int = 98,
        cosine: bool = False,
    ) -> None:
        super().__init__(dims, num_heads, cosine)
        self.num_keys = num_keys
        shape = (num_heads, num_groups, dims // num_heads)
        self.register_buffer('centroids', F.normalize(torch.randn(shape), dim=-1))
        sums, counts = torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.int32)
        self.register_buffer('group_sums', sums, persistent=False)
        self.register_buffer('group_counts', counts, persistent=False)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Tensor:
        """(B, H, L, D) each -> (B, H, L, D)."""
        out, sums, counts = dynamic_group_attention(
            query,
            key,
            value,
            self.centroids,
            self.num_keys,
            scale,
            with_sums=self.training,
        )
        if self.training:
            self.group_sums.copy_(sums)
            self.group_counts.copy_(counts)
        return out

    def extra_repr(self) -> str:
        """Name the groups and keys when printed."""
        return f'num_groups={self.centroids.shape[1]}, num_keys={self.num_keys}'


@torch.no_grad()
def update_centroids(
    model: nn.Module, keep: float, reseed: bool = False
) -> dict[str, Tensor]:
    """Move the centroids of a model to the means of their groups, eqs. 3 and 4.

    ``e = Norm(keep * e + (1 - keep) * e')`` with ``e'`` the mean of the normalised
    queries that the last training forward pass assigned to the group. To be called
    after every training iteration, on all processes alike: sums and counts are
    added up over them first. A group without queries keeps its centroid, and so
    does one whose mean is not finite.

    Args:
        model (nn.Module): Any model that holds :class:`DynamicGroupAttention`.
        keep (float): Weight of the old centroid, tau in eq. 4.
        reseed (bool): Whether a group without queries splits a large one instead of
            keeping its centroid: the r-th of them moves next to the centroid of the
            r-th largest group, on the side where it was.

    Returns:
        dict: Name of every DG-Attention layer to its (H, G) numbers of queries in
        the groups, over all processes. All zero if it did not train.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, DynamicGroupAttention)
    }
    if not layers:
        return {}
    terms = [t for m in layers.values() for t in (m.group_sums, m.group_counts)]
    # One reduction for all layers; float64 holds the counts exactly.
    flat = torch.cat([term.flatten().double() for term in terms])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat)
    parts = iter(flat.split([term.numel() for term in terms]))
    group_counts = {}
    for name, layer in layers.items():
        sums = next(parts).view_as(layer.group_sums)
        counts = next(parts).view_as(layer.group_counts)
        mean = sums / counts.unsqueeze(-1)  # eq. 3
        moved = F.normalize(keep * layer.centroids + (1 - keep) * mean, dim=-1)  # eq. 4
        usable = (counts > 0) & mean.isfinite().all(-1)
        moved = torch.where(usable[..., None], moved, layer.centroids.double())
        if reseed and counts.any():
            moved = _split_largest(moved, counts)
        layer.centroids.copy_(moved)
        # A process that skips the next iteration adds nothing to it.
        layer.group_sums.zero_()
        layer.group_counts.zero_()
        group_counts[name] = counts
    return group_counts


def _split_largest(centroids: Tensor, counts: Tensor) -> Tensor:
    """Put the centroids of empty groups beside those of the largest.

    Args:
        centroids (Tensor): (H, G, D).
        counts (Tensor): (H, G).

    Returns:
        Tensor: (H, G, D).
    """
    empty = counts == 0
    # Place among the empty groups of the head, round and round the others.
    rank = (empty.cumsum(1) - 1).clamp(min=0) % (~empty).sum(1, keepdim=True)
    by_size = counts.argsort(dim=1, descending=True, stable=True)
    largest = by_size.gather(1, rank)[..., None].expand_as(centroids)
    split = F.normalize(centroids.gather(1, largest) + NUDGE * centroids, dim=-1)
    return torch.where(empty[..., None], split, centroids)
