"""DG-Attention in plain PyTorch: the equations of section 3.1, line by line.

These functions define what the operators mean. They run on every device and
data type, differentiate by autograd, and serve as the kernels wherever the
compiled extension has none. Their memory grows linearly with the tokens.

Letters: B batch, H heads, L tokens, D head dim, G groups, K keys per group,
N_j queries of group j.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows that share one matrix product. Every group's queries are padded to a
# multiple of it: larger tiles pad more, smaller ones read the keys more often.
TILE = 32
# With few tokens, masking the dense score matrix beats regrouping the queries.
# It has at most DENSE_RATIO * K * L entries, which stays linear in L.
DENSE_RATIO = 4


def assign_queries(
    query: Tensor, centroids: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Assign every query to its nearest centroid and sum up the groups.

    Args:
        query (Tensor): (B, H, L, D).
        centroids (Tensor): (H, G, D), float32.
        with_sums (bool): Whether to return the terms of eq. 3 as well.

    Returns:
        tuple: ``group`` (B, H, L) int32; ``sums`` (H, G, D) of the normalised
        queries and ``counts`` (H, G) int32 over the batch, both empty unless
        asked for.
    """
    num_groups = centroids.shape[1]
    # Scores decide, so half precision will not do. torch.set_float32_matmul_precision
    # lowers them all the same.
    query = query.float()
    # Norm(q) scales all scores of a query alike, so the argmax needs none.
    # torch.argmax takes the first of several maxima.
    scores = query @ centroids.mT  # (B, H, L, G)
    group = scores.argmax(-1)
    if not with_sums:
        return group.int(), query.new_empty(0), group.new_empty(0, dtype=torch.int32)
    member = F.one_hot(group, num_groups)  # (B, H, L, G)
    unit = F.normalize(query, dim=-1)
    sums = torch.einsum('bhlg,bhld->hgd', member.float(), unit)
    return group.int(), sums, member.sum((0, 2), dtype=torch.int32)


def select_keys(key: Tensor, centroids: Tensor, num_keys: int, sorted: bool) -> Tensor:
    """Select the Top-K keys of every centroid, eq. 1.

    Args:
        key (Tensor): (B, H, L, D).
        centroids (Tensor): (H, G, D), float32.
        num_keys (int): K, clamped to L.
        sorted (bool): Whether the order matters: higher scores first, then lower
            tokens. The selected set is the same either way.

    Returns:
        Tensor: ``index`` (B, H, G, min(K, L)), int32.
    """
    num_tokens = key.shape[2]
    num_keys = min(num_keys, num_tokens)
    scores = centroids @ key.float().mT  # (B, H, G, L)
    if torch.onnx.is_in_onnx_export():  # ONNX's TopK takes the lower of equal ones
        return scores.topk(num_keys, sorted=sorted).indices.int()
    # torch.topk leaves open which of several equal scores it takes. One integer
    # per candidate, its score above its token, leaves no ties; adding zero makes
    # -0 equal to +0, and NaN ranks with the infinite scores, so that it shows.
    scores = (scores + 0.0).nan_to_num(torch.inf, torch.inf, -torch.inf)
    bits = scores.view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    token = torch.arange(num_tokens, device=key.device)
    rank = bits * 2**32 - token
    return rank.topk(num_keys, sorted=sorted).indices.int()


def group_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Tensor,
    index: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over the keys of its group, eq. 2.

    Args:
        query, key, value (Tensor): (B, H, L, D).
        group (Tensor): (B, H, L), integer.
        index (Tensor): (B, H, G, K), integer.
        scale (float): Factor of the scores.

    Returns:
        tuple: ``out`` (B, H, L, D) and ``logsumexp`` (B, H, L) of the scores.
    """
    layout = _layout(group, index)
    scores = _scores(layout, query, key, scale)
    logsumexp = scores.logsumexp(-1, keepdim=True)
    probability = (scores - logsumexp).exp()
    out = probability @ layout.select(value.to(scores.dtype))
    return layout.restore(out).to(value.dtype), layout.restore(logsumexp).squeeze(-1)


def group_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Tensor,
    index: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`group_attention`, the probabilities recomputed.

    Args:
        grad_out (Tensor): (B, H, L, D), gradient of ``out``.
        query, key, value, group, index, scale: As in the forward pass.
        out, logsumexp (Tensor): What the forward pass returned.

    Returns:
        tuple: Gradients of query, key and value, (B, H, L, D) each. A key that
        several groups selected sums their gradients.
    """
    layout = _layout(group, index)
    scores = _scores(layout, query, key, scale)
    accumulate = scores.dtype
    tiles = [layout.spread(x.to(accumulate)) for x in (query, grad_out, out)]
    q, d_out, out_tiles = tiles
    k, v = layout.select(key.to(accumulate)), layout.select(value.to(accumulate))

    probability = (scores - layout.spread(logsumexp.unsqueeze(-1))).exp()
    d_value = probability.mT @ d_out
    d_probability = d_out @ v.mT
    delta = (d_out * out_tiles).sum(-1, keepdim=True)
    d_scores = probability * (d_probability - delta) * scale
    d_query, d_key = layout.restore(d_scores @ k), layout.unselect(d_scores.mT @ q)
    d_value, dtype = layout.unselect(d_value), query.dtype
    return d_query.to(dtype), d_key.to(dtype), d_value.to(dtype)


def _scores(
    layout: '_Masked | _Tiled', query: Tensor, key: Tensor, scale: float
) -> Tensor:
    """scale * q k^T in float32 or better, (B, H, tiles, rows, keys)."""
    accumulate = torch.promote_types(query.dtype, torch.float32)
    q, k = (
        layout.spread(query.to(accumulate) * scale),
        layout.select(key.to(accumulate)),
    )
    return q @ k.mT + layout.bias


def _layout(group: Tensor, index: Tensor) -> '_Masked | _Tiled':
    if group.shape[-1] <= DENSE_RATIO * index.shape[-1]:
        return _Masked(group.long(), index.long())
    return _Tiled(group.long(), index.long())


class _Masked:
    """One tile of all tokens in which a query sees the keys of its group alone."""

    def __init__(self, group: Tensor, index: Tensor) -> None:
        (B, H, L), G = group.shape, index.shape[2]
        bias = torch.full((B, H, G, L), -torch.inf, device=group.device)
        bias = bias.scatter(-1, index, 0.0)
        self.bias = bias.gather(2, _expand(group, L)).unsqueeze(2)  # (B, H, 1, L, L)

    def spread(self, x: Tensor) -> Tensor:
        return x.unsqueeze(2)

    def restore(self, x: Tensor) -> Tensor:
        return x.squeeze(2)

    select, unselect = spread, restore


class _Tiled:
    """Queries sorted by group, every group cut into tiles of TILE rows.

    All shapes follow from L, G and K alone: a group of N_j queries fills
    ceil(N_j / TILE) tiles, so L // TILE + G tiles always suffice.
    """

    bias = 0.0

    def __init__(self, group: Tensor, index: Tensor) -> None:
        (B, H, L), G = group.shape, index.shape[2]
        self.num_tiles = L // TILE + G
        size = group.new_zeros(B, H, G).scatter_add(-1, group, torch.ones_like(group))
        tiles = (size + TILE - 1) // TILE
        tiles_end = tiles.cumsum(-1)
        tokens = torch.arange(L, device=group.device)
        order = (group * L + tokens).argsort(-1)  # by group, then by token
        sorted_group = group.gather(-1, order)
        # A query's slot: where its group's tiles begin, plus its rank in the group.
        shift = TILE * (tiles_end - tiles) - (size.cumsum(-1) - size)
        slot = tokens + shift.gather(-1, sorted_group)
        self.slot = torch.empty_like(slot).scatter(-1, order, slot)  # (B, H, L)

        tile = torch.arange(self.num_tiles, device=group.device).unsqueeze(-1)
        tile_group = (tiles_end.unsqueeze(-2) <= tile).sum(-1)  # (B, H, tiles)
        tile_group = tile_group.clamp(max=G - 1)  # tiles without queries
        self.token = _rows(index, tile_group)  # (B, H, tiles, K)
        self.num_tokens = L

    def spread(self, x: Tensor) -> Tensor:
        """(B, H, L, D) -> (B, H, tiles, TILE, D), zeros where no query stands."""
        B, H, _, D = x.shape
        padded = x.new_zeros(B, H, self.num_tiles * TILE, D)
        padded = padded.scatter(2, _expand(self.slot, D), x)
        return padded.unflatten(2, (self.num_tiles, TILE))

    def restore(self, x: Tensor) -> Tensor:
        """(B, H, tiles, TILE, D) -> (B, H, L, D)."""
        return _rows(x.flatten(2, 3), self.slot)

    def select(self, x: Tensor) -> Tensor:
        """(B, H, L, D) -> (B, H, tiles, K, D), the keys of every tile's group."""
        return _rows(x, self.token.flatten(2)).unflatten(2, self.token.shape[2:])

    def unselect(self, x: Tensor) -> Tensor:
        """Adjoint of ``select``: (B, H, tiles, K, D) -> (B, H, L, D)."""
        B, H, _, _, D = x.shape
        total = x.new_zeros(B, H, self.num_tokens, D)
        return total.scatter_add(2, _expand(self.token.flatten(2), D), x.flatten(2, 3))


def _expand(index: Tensor, width: int) -> Tensor:
    """(B, H, N) -> (B, H, N, width), the form that gather and scatter ask for."""
    return index.unsqueeze(-1).expand(*index.shape, width)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, H, M, D), index (B, H, N) -> (B, H, N, D)."""
    return x.gather(2, _expand(index, x.shape[-1]))
