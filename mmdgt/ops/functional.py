"""The public functions of DG-Attention and the choice of their back end."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import extension, library, reference

_loaded, _problem = extension.load()
_no_extension = None if _loaded else f'{_problem}; {extension.HOW_TO_BUILD}'
_kernel_devices = extension.devices()

BACKENDS = ('auto', 'fused', 'reference')
_FUSED_DTYPES = {
    'cpu': (torch.float32, torch.float64, torch.float16, torch.bfloat16),
    'cuda': (torch.float32, torch.float16, torch.bfloat16),
}
_MAX_FUSED_GROUPS = 256
_MAX_FUSED_DIM = 128
_backend = 'auto'


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the back end of DG-Attention within a ``with`` block.

    Args:
        name (str): 'auto' takes the compiled kernels where they serve and plain
            PyTorch elsewhere; 'fused' insists on the kernels and raises where
            there are none; 'reference' takes plain PyTorch, differentiated by
            autograd. ``torch.onnx.export`` gets plain PyTorch whatever is chosen.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f'backend must be one of {BACKENDS}, got {name!r}')
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


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
    _check_tokens(query=query)
    _check_centroids(centroids, query)
    return _choose('assign_queries', query, centroids, False)[0]


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
    _check_tokens(key=key)
    _check_centroids(centroids, key)
    _check_num_keys(num_keys)
    return _choose('select_keys', key, centroids, num_keys, sorted)


def group_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Tensor,
    index: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Attend every query to the keys selected for its group, eq. 2.

    ``out[b, h, l] = softmax(scale * query[b, h, l] . key[b, h, i]) value[b, h, i]``
    over ``i in index[b, h, group[b, h, l]]``, computed in float32 or better.
    Differentiable in query, key and value.

    Args:
        query, key, value (Tensor): (B, H, L, D), one floating point type, on one
            device. Strided views are read in place.
        group (Tensor): (B, H, L), integer, in [0, G).
        index (Tensor): (B, H, G, K), integer, in [0, L), no token twice in a row
            of K.
        scale (float, optional): Factor of the scores. Defaults to ``D ** -0.5``.

    Returns:
        Tensor: (B, H, L, D), of the inputs' data type.

    Raises:
        ValueError, TypeError: If shapes, data types or devices do not fit.
        IndexError: If a group or token is out of range. Looking costs one wait
            for the device, so it is left out while compiling or capturing.
    """
    _check_tokens(query=query, key=key, value=value)
    _check_choice('group', group, query, query.shape[:3])
    if index.ndim != 4:
        raise ValueError(
            f'index must have shape (B, H, G, K), got {tuple(index.shape)}'
        )
    _check_choice('index', index, query, (*query.shape[:2], *index.shape[2:]))
    _check_range('group', group, index.shape[2], 'groups (index.shape[2])')
    _check_range('index', index, query.shape[2], 'tokens (query.shape[2])')
    return _attend(query, key, value, group, index, scale)


def dynamic_group_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centroids: Tensor,
    num_keys: int,
    scale: float | None = None,
    with_sums: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Assign, select and attend in one go: DG-Attention of section 3.1.

    Args:
        query, key, value (Tensor): (B, H, L, D), one floating point type.
        centroids (Tensor): (H, G, D), floating point.
        num_keys (int): K, at least 1; clamped to L.
        scale (float, optional): Factor of the scores. Defaults to ``D ** -0.5``.
        with_sums (bool): Whether to return the terms of eq. 3 too.

    Returns:
        tuple: ``out`` (B, H, L, D); ``sums`` (H, G, D), the normalised queries of
        every group summed over the batch, float32; ``counts`` (H, G), their
        number, int32. Both are empty unless asked for.

    Raises:
        ValueError, TypeError: If K < 1 or shapes, data types or devices do not
            fit.
    """
    _check_tokens(query=query, key=key, value=value)
    _check_centroids(centroids, query)
    _check_num_keys(num_keys)
    group, sums, counts = _choose('assign_queries', query, centroids, with_sums)
    index = _choose('select_keys', key, centroids, num_keys, False)
    return _attend(query, key, value, group, index, scale), sums, counts


def fused(name: str, x: Tensor) -> bool:
    """Whether the chosen back end has a kernel of that operator for such a tensor."""
    device = x.device.type
    return (
        _backend != 'reference'
        and device in _FUSED_DTYPES
        and x.dtype in _FUSED_DTYPES[device]
        and torch._C._dispatch_has_kernel_for_dispatch_key(
            f'{library.NAMESPACE}::{name}', device.upper()
        )
        and not torch.onnx.is_in_onnx_export()
    )


def _attend(query, key, value, group, index, scale) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    run = _kernel('group_attention', query, index.shape[2])
    with _without_autocast(query):
        rows = map(_row_major, (query, key, value))
        return run(*rows, group.int().contiguous(), index.int().contiguous(), scale)[0]


def _choose(name: str, tokens: Tensor, centroids: Tensor, *args) -> Any:
    """Run an operator that returns integers, which carry no gradient."""
    tokens, centroids = tokens.detach(), centroids.detach().float().contiguous()
    run = _kernel(name, tokens, centroids.shape[1])
    with _without_autocast(tokens):
        return run(_row_major(tokens), centroids, *args)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Half precision inside the reference would cost it its float32 sums."""
    if x.is_meta:  # knows no autocast
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _kernel(name: str, tokens: Tensor, num_groups: int) -> Callable:
    """The function that serves an operator under the chosen back end."""
    if torch.onnx.is_in_onnx_export():  # ONNX knows no operators of ours
        return getattr(reference, name)
    reason = _no_extension or _unsupported(tokens, num_groups)
    if _backend == 'fused' and reason:
        raise RuntimeError(f'back end "fused" was chosen, but {reason}')
    if _backend == 'auto' and reason and not _no_extension:
        _warn_once(f'DG-Attention runs in plain PyTorch here, for {reason}')
    # Without the extension the operator itself runs the reference, and is still
    # known to FLOP counters and compilers.
    if _backend == 'reference' or (reason and not _no_extension):
        return getattr(reference, name)
    return getattr(library.ops, name)


def _unsupported(tokens: Tensor, num_groups: int) -> str | None:
    """Why the compiled kernels do not serve these inputs, if they do not."""
    device, D = tokens.device.type, tokens.shape[-1]
    if device == 'meta':  # Shapes alone, which the operator knows.
        return None
    if device not in _kernel_devices:
        return f'the extension was built without kernels for {device}'
    if tokens.dtype not in _FUSED_DTYPES[device]:
        return f'its kernels on {device} take no {tokens.dtype}'
    if D % 8 or D > _MAX_FUSED_DIM:
        return f'its kernels take head dims that 8 divides up to 128, got {D}'
    if num_groups > _MAX_FUSED_GROUPS:
        return f'its kernels take up to {_MAX_FUSED_GROUPS} groups, got {num_groups}'
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _row_major(x: Tensor) -> Tensor:
    """The kernels read whole rows of D, so the last stride must be 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_tokens(**tensors: Tensor) -> None:
    """All (B, H, L, D), of one shape, floating point type and device."""
    (first_name, first), *others = tensors.items()
    if first.ndim != 4:
        raise ValueError(
            f'{first_name} must have shape (B, H, L, D), got {tuple(first.shape)}'
        )
    if not first.is_floating_point():
        raise TypeError(f'{first_name} must be floating point, got {first.dtype}')
    for name, x in others:
        for what in ('shape', 'dtype', 'device'):
            expected, got = getattr(first, what), getattr(x, what)
            if expected != got:
                kind = TypeError if what == 'dtype' else ValueError
                raise kind(
                    f'{name} must have the {what} of {first_name}, {expected},'
                    f' got {got}'
                )


def _check_centroids(centroids: Tensor, tokens: Tensor) -> None:
    _, H, _, D = tokens.shape
    if centroids.ndim != 3 or (centroids.shape[0], centroids.shape[2]) != (H, D):
        raise ValueError(
            f'centroids must have shape (H, G, D) with H = {H} and D = {D}, got'
            f' {tuple(centroids.shape)}'
        )
    if centroids.shape[1] < 1:
        raise ValueError('centroids must have at least one group, got G = 0')
    if not centroids.is_floating_point():
        raise TypeError(f'centroids must be floating point, got {centroids.dtype}')
    if centroids.device != tokens.device:
        raise ValueError(
            f'centroids must be on {tokens.device} like the tokens, got'
            f' {centroids.device}'
        )


def _check_num_keys(num_keys: int) -> None:
    if num_keys < 1:
        raise ValueError(f'num_keys (K) must be at least 1, got {num_keys}')


def _check_choice(name: str, x: Tensor, tokens: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f'{name} must have shape {tuple(shape)}, got {tuple(x.shape)}')
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f'{name} must be int32 or int64, got {x.dtype}')
    if x.device != tokens.device:
        raise ValueError(
            f'{name} must be on {tokens.device} like the query, got {x.device}'
        )


def _check_range(name: str, x: Tensor, limit: int, what: str) -> None:
    if torch.compiler.is_compiling() or not x.numel():
        return
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    low, high = (int(v) for v in x.aminmax())
    if low < 0 or high >= limit:
        raise IndexError(
            f'{name} must lie in [0, {limit}), the number of {what}, got values from'
            f' {low} to {high}'
        )
