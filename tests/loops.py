"""The equations once more, as slow loops over NumPy arrays in float64.

Written from the paper and from nothing else, to hold the operators against.
"""

import numpy as np


def unit(x):
    """Divide a vector by its length."""
    return x / np.sqrt(sum(v * v for v in x))


def assign(query, centroids):
    """query (B, H, L, D), centroids (H, G, D) -> group (B, H, L)."""
    B, H, L, _ = query.shape
    group = np.zeros((B, H, L), dtype=int)
    for b in range(B):
        for h in range(H):
            for i in range(L):
                best = -np.inf
                for j, centroid in enumerate(centroids[h]):
                    score = float(np.dot(centroid, unit(query[b, h, i])))
                    if score > best:
                        best, group[b, h, i] = score, j
    return group


def select(key, centroids, num_keys):
    """key (B, H, L, D), centroids (H, G, D) -> index (B, H, G, min(K, L))."""
    B, H, L, _ = key.shape
    rows = []
    for b in range(B):
        for h in range(H):
            for centroid in centroids[h]:
                scores = [float(np.dot(centroid, key[b, h, i])) for i in range(L)]
                order = sorted(range(L), key=lambda i: (-scores[i], i))
                rows.append(order[:num_keys])
    return np.array(rows, dtype=int).reshape(B, H, centroids.shape[1], -1)


def attend(query, key, value, group, index, scale, bias=None):
    """(B, H, L, D) three times, group (B, H, L), index (B, H, G, K) -> (B, H, L, D).

    A bias (H, L, L) is added to the scores.
    """
    out = np.zeros_like(query)
    for b, h, i in np.ndindex(*query.shape[:3]):
        tokens = index[b, h, group[b, h, i]]
        weights = np.array(
            [np.exp(scale * query[b, h, i] @ key[b, h, t]) for t in tokens]
        )
        if bias is not None:
            weights *= [np.exp(bias[h, i, t]) for t in tokens]
        for weight, t in zip(weights / weights.sum(), tokens, strict=True):
            out[b, h, i] += weight * value[b, h, t]
    return out


def mean_queries(query, group, num_groups):
    """Eq. 3: query (B, H, L, D), group (B, H, L) -> means (H, G, D), counts (H, G)."""
    B, H, L, D = query.shape
    total, counts = np.zeros((H, num_groups, D)), np.zeros((H, num_groups), dtype=int)
    for b, h, i in np.ndindex(B, H, L):
        total[h, group[b, h, i]] += unit(query[b, h, i])
        counts[h, group[b, h, i]] += 1
    return total / np.maximum(counts, 1)[..., None], counts


def move_centroids(centroids, means, counts, keep):
    """Eq. 4: the new centroids (H, G, D)."""
    moved = centroids.copy()
    for h, j in np.ndindex(*counts.shape):
        if counts[h, j]:
            moved[h, j] = unit(keep * centroids[h, j] + (1 - keep) * means[h, j])
    return moved


def conv3x3(x, weight, bias, groups=1):
    """x (C, H, W), weight (C_out, C / groups, 3, 3), padding 1 -> (C_out, H, W)."""
    _, H, W = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(weight), H, W))
    per_group = len(weight) // groups
    for o, y, z in np.ndindex(*out.shape):
        first = (o // per_group) * weight.shape[1]
        patch = padded[first : first + weight.shape[1], y : y + 3, z : z + 3]
        out[o, y, z] = (patch * weight[o]).sum() + bias[o]
    return out
