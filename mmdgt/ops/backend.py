"""Which back end serves an operator: the compiled kernels or plain PyTorch."""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import extension, library, reference

BACKENDS = ('auto', 'fused', 'reference')

_limits, _problem = extension.load()
_kernel_devices = extension.devices()
_devices_for_few = extension.devices('choose_and_attend')


class _Choice(threading.local):
    """The back end that a thread has chosen; torch.compile guards on it."""

    def __init__(self) -> None:
        self.name = 'auto'


_choice = _Choice()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the back end of DG-Attention within a ``with`` block, for this thread.

    Args:
        name (str): 'auto' takes the compiled kernels where they serve and plain
            PyTorch elsewhere; 'fused' insists on the kernels and raises where
            there are none; 'reference' takes plain PyTorch, differentiated by
            autograd. ``torch.onnx.export`` gets plain PyTorch whatever is chosen.
    """
    if name not in BACKENDS:
        raise ValueError(f'backend must be one of {BACKENDS}, got {name!r}')
    previous, _choice.name = _choice.name, name
    try:
        yield
    finally:
        _choice.name = previous


def function(name: str, tokens: Tensor, num_groups: int) -> Callable:
    """The function that serves an operator of DG-Attention.

    Args:
        name (str): Of the operator, such as 'group_attention'.
        tokens (Tensor): (B, H, L, D), its first argument.
        num_groups (int): G.

    Raises:
        RuntimeError: If 'fused' was chosen and no kernel serves.
    """
    if torch.onnx.is_in_onnx_export():  # ONNX knows no operators of ours
        return getattr(reference, name)
    reason = why_not_fused(tokens, num_groups)
    if _choice.name == 'fused' and reason:
        raise RuntimeError(f'back end "fused" was chosen, but {reason}')
    # Compilers trace no warnings.
    if _choice.name == 'auto' and reason and not torch.compiler.is_compiling():
        _warn_once(reason)
    # Without the extension the operator itself runs the reference, and is still
    # known to FLOP counters and compilers.
    if _choice.name == 'reference' or (reason and _limits):
        return getattr(reference, name)
    return getattr(library.ops, name)


def why_not_fused(tokens: Tensor, num_groups: int) -> str | None:
    """Why no kernel of DG-Attention serves these tokens, None where one does."""
    device, D = tokens.device.type, tokens.shape[-1]
    if device == 'meta':  # Shapes alone, which the operator knows.
        return None
    if not _limits:
        return f'{_problem}; {extension.HOW_TO_BUILD}'
    if device not in _kernel_devices:
        return (
            f'the extension was built without kernels for {device};'
            f' {extension.HOW_TO_BUILD} where PyTorch sees the device'
        )
    dtype = str(tokens.dtype).removeprefix('torch.')
    if dtype not in _limits['dtypes'][device]:
        return (
            f'its kernels on {device} take {", ".join(_limits["dtypes"][device])}, got'
            f' {dtype}'
        )
    step, most = _limits['head_dim_step'], _limits['max_head_dim']
    if D % step or most < D:
        return f'its kernels take head dims that {step} divides up to {most}, got {D}'
    if num_groups > _limits['max_groups']:
        return (
            f'its kernels take up to {_limits["max_groups"]} groups, got {num_groups}'
        )
    return None


def serves_few(tokens: Tensor, num_groups: int) -> bool:
    """Whether one kernel assigns, selects and attends for these (B, H, L, D) tokens."""
    return (
        tokens.device.type in _devices_for_few
        and _choice.name != 'reference'
        and not torch.onnx.is_in_onnx_export()
        and why_not_fused(tokens, num_groups) is None
        and tokens.element_size() == 2
        and tokens.shape[2] <= _limits['max_few_tokens']
        and tokens.shape[3] <= _limits['max_few_head_dim']
    )


def channels_served(name: str, x: Tensor, channels: int) -> bool:
    """Whether a kernel of an operator by channels serves x, here and now.

    A compiler fuses by itself, and an exported network holds no operators of ours
    that a runtime does not know.
    """
    return (
        bool(_limits)
        and _choice.name != 'reference'
        and not torch.compiler.is_compiling()
        and not torch.onnx.is_in_onnx_export()
        and torch._C._dispatch_has_kernel_for_dispatch_key(
            f'{library.NAMESPACE}::{name}', x.device.type.upper()
        )
        and str(x.dtype).removeprefix('torch.') in _limits['dtypes'][x.device.type]
        and channels % _limits['channel_step'] == 0
        and x.numel() > 0
    )


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A context in which x's device computes in the data types that are given.

    Half precision inside the reference would cost it its float32 sums.
    """
    device = x.device.type
    # What is off already is left alone, which costs nothing; meta knows no autocast.
    if x.is_meta or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        'DG-Attention runs in plain PyTorch here, which takes 5 to 41 times as long'
        f' as its kernels (docs/benchmarks), because {reason}',
        stacklevel=2,
    )
