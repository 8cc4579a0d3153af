"""Checks of what the public functions are given: expected, got, what to do."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_tokens(**tensors: Tensor) -> None:
    """All (B, H, L, D), of one shape, floating point type and device."""
    (first_name, first), *others = tensors.items()
    for name, x in tensors.items():
        _check_tensor(name, x)
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


def check_centroids(centroids: Tensor, tokens: Tensor) -> None:
    """(H, G, D) floating point, on the device of the tokens (B, H, L, D)."""
    _check_tensor('centroids', centroids)
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
    _check_device('centroids', centroids, tokens)


def check_num_keys(num_keys: int) -> None:
    """K, a whole number of at least 1."""
    if isinstance(num_keys, bool) or not isinstance(num_keys, (int, torch.SymInt)):
        raise TypeError(f'num_keys (K) must be an integer, got {num_keys!r}')
    if num_keys < 1:
        raise ValueError(f'num_keys (K) must be at least 1, got {num_keys}')


def check_scale(scale: float) -> None:
    """A number; while compiling it may be unknown."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f'scale must be a number or None, got {scale!r}')
    if not torch.compiler.is_compiling() and not math.isfinite(scale):
        raise ValueError(f'scale must be finite, got {scale}')


def check_choice(group: Tensor, index: Tensor, tokens: Tensor) -> None:
    """Group (B, H, L) and index (B, H, G, K), integer, beside tokens (B, H, L, D)."""
    _check_tensor('group', group)
    _check_tensor('index', index)
    if index.ndim != 4:
        raise ValueError(
            f'index must have shape (B, H, G, K), got {tuple(index.shape)}'
        )
    _check_integers('group', group, tokens, tokens.shape[:3])
    _check_integers('index', index, tokens, (*tokens.shape[:2], *index.shape[2:]))
    if index.shape[3] == 0 < tokens.shape[2]:
        raise ValueError('index must name at least one token of a group, got K = 0')


def check_range(group: Tensor, index: Tensor, tokens: Tensor) -> None:
    """Groups in [0, G) and tokens in [0, L).

    Looking costs a wait for the device, so it is left out while compiling or
    capturing.
    """
    _check_values('group', group, index.shape[2], 'groups (index.shape[2])')
    _check_values('index', index, tokens.shape[2], 'tokens (query.shape[2])')


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(x).__name__}')


def _check_integers(name: str, x: Tensor, tokens: Tensor, shape: Sequence[int]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f'{name} must have shape {tuple(shape)}, got {tuple(x.shape)}')
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f'{name} must be int32 or int64, got {x.dtype}')
    _check_device(name, x, tokens)


def _check_device(name: str, x: Tensor, tokens: Tensor) -> None:
    if x.device != tokens.device:
        raise ValueError(
            f'{name} must be on {tokens.device} like the tokens, got {x.device}'
        )


def _check_values(name: str, x: Tensor, limit: int, what: str) -> None:
    if torch.compiler.is_compiling() or x.is_meta or not x.numel():
        return
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    low, high = (int(v) for v in x.aminmax())
    if low < 0 or high >= limit:
        raise IndexError(
            f'{name} must lie in [0, {limit}), the number of {what}, got values from'
            f' {low} to {high}'
        )
