"""The public functions of DG-Attention."""

from typing import Any

from torch import Tensor

from . import backend, checks, library


def assign_queries(query: Tensor, centroids: Tensor) -> Tensor:
    """Assign every query to the group of its nearest centroid.

    ``group[b, h, l] = argmax_j centroids[h, j] . Norm(query[b, h, l])``, the
    lowest j on a tie (section 3.1).

    Args:
        query (Tensor): (B, H, L, D), floating point.
        centroids (Tensor): (H, G, D), floating point.

    Returns:
        Tensor: (B, H, L), int32, in [0, G).

    Raises:
        ValueError, TypeError: If shapes, data types or devices do not fit.
    """
    return _assign(query, centroids, with_sums=False)[0]


def assign_and_sum(query: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Assign the queries and sum up the groups, the terms of eq. 3.

    Args:
        query, centroids (Tensor): As for :func:`assign_queries`.

    Returns:
        tuple: ``group`` (B, H, L), int32; ``sums`` (H, G, D), the normalised queries
        of every group summed over the batch, float32; ``counts`` (H, G), their
        number, int32.

    Raises:
        ValueError, TypeError: If shapes, data types or devices do not fit.
    """
    return _assign(query, centroids, with_sums=True)


def select_keys(
    key: Tensor, centroids: Tensor, num_keys: int, sorted: bool = True
) -> Tensor:
    """Select the Top-K keys of every centroid, eq. 1.

    Args:
        key (Tensor): (B, H, L, D), floating point.
        centroids (Tensor): (H, G, D), floating point.
        num_keys (int): K, at least 1; clamped to L.
        sorted (bool): Whether the keys come in the order of choice: higher
            scores first, on a tie the lower token. Otherwise the same keys come
            in any order, which is faster and all that attention needs.

    Returns:
        Tensor: (B, H, G, min(K, L)), int32, tokens in [0, L).

    Raises:
        ValueError, TypeError: If K < 1 or shapes, data types or devices do not
            fit.
    """
    checks.check_tokens(key=key)
    checks.check_centroids(centroids, key)
    checks.check_num_keys(num_keys)
    return _choose('select_keys', key, centroids, num_keys, sorted)


def group_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Tensor,
    index: Tensor,
    scale: float | None = None,
    check_range: bool = True,
) -> Tensor:
    """Attend every query to the keys selected for its group, eq. 2.

    ``out[b, h, l] = softmax(scale * query[b, h, l] . key[b, h, i]) value[b, h, i]``
    over ``i in index[b, h, group[b, h, l]]``, computed in float32 or better.
    Differentiable in query, key and value, once by the kernels.

    Args:
        query, key, value (Tensor): (B, H, L, D), one floating point type, on one
            device. Strided views are read in place.
        group (Tensor): (B, H, L), integer, in [0, G).
        index (Tensor): (B, H, G, K), integer, in [0, L), no token twice in a row
            of K.
        scale (float, optional): Factor of the scores. Defaults to ``D ** -0.5``.
        check_range (bool): Whether to look for groups and tokens out of range, which
            costs one wait for the device. Never while compiling or capturing.

    Returns:
        Tensor: (B, H, L, D), of the inputs' data type.

    Raises:
        ValueError, TypeError: If shapes, data types or devices do not fit.
        IndexError: If a group or token is out of range.
    """
    checks.check_tokens(query=query, key=key, value=value)
    checks.check_choice(group, index, query)
    if check_range:
        checks.check_range(group, index, query)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    else:
        checks.check_scale(scale)
    run = backend.function('group_attention', query, index.shape[2])
    with backend.without_autocast(query):
        rows = map(_row_major, (query, key, value))
        choice = group.int().contiguous(), index.int().contiguous()
        return run(*rows, *choice, float(scale))[0]


def choose_and_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centroids: Tensor,
    num_keys: int,
    scale: float | None,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Assign, select and attend in one launch, where :func:`backend.serves_few`.

    Args:
        query, key, value (Tensor): As for :func:`group_attention`.
        centroids (Tensor): As for :func:`assign_queries`.
        num_keys (int): As for :func:`select_keys`.
        scale (float, optional): As for :func:`group_attention`.
        with_sums (bool): Whether to return the terms of eq. 3 too.

    Returns:
        tuple: ``out`` (B, H, L, D); ``sums`` (H, G, D) and ``counts`` (H, G) as from
        :func:`assign_and_sum`, empty unless asked for.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    rows = map(_row_major, (query, key, value))
    centroids = centroids.detach().float().contiguous()
    out, _, _, _, *terms = library.ops.choose_and_attend(
        *rows, centroids, num_keys, scale, with_sums
    )
    return out, *terms


def _assign(query: Tensor, centroids: Tensor, with_sums: bool) -> Any:
    checks.check_tokens(query=query)
    checks.check_centroids(centroids, query)
    return _choose('assign_queries', query, centroids, with_sums)


def _choose(name: str, tokens: Tensor, centroids: Tensor, *args: Any) -> Any:
    """Run an operator that returns integers, which carry no gradient."""
    tokens, centroids = tokens.detach(), centroids.detach().float().contiguous()
    run = backend.function(name, tokens, centroids.shape[1])
    with backend.without_autocast(tokens):
        return run(_row_major(tokens), centroids, *args)


def _row_major(x: Tensor) -> Tensor:
    """The kernels read whole rows of D, so the last stride must be 1."""
    return x if x.stride(-1) == 1 else x.contiguous()
