"""How the centroids of DG-Attention move, eqs. 3 and 4."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import DynamicGroupAttention

NUDGE = 0.1  # how far a split-off centroid stands from the one it splits


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
        layer.moved = True
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
