"""Peak memory of running a model, which the benchmarks share."""

import ctypes
import itertools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn


def resident_bytes(what: str) -> int:
    """VmRSS, the resident size of this process, or VmHWM, its peak."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(what))


def added_bytes(call: Callable[[], Any], device: str, times: int = 1) -> int:
    """What calls add at their peak to this process, which had better be a fresh one.

    What ran before leaves the allocator in another state: after a model of 4 GiB,
    ResNet-50's peak was 953 instead of 692 MiB.

    Args:
        call (Callable): What to measure.
        device (str): 'cpu', where resident memory counts, or 'cuda', where what
            PyTorch allocated does.
        times (int): How often to call.
    """
    if device == 'cpu':
        ctypes.CDLL(None).malloc_trim(0)  # what is free
        before = resident_bytes('VmRSS')
        Path('/proc/self/clear_refs').write_text('5')  # resets the peak
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(times):
        call()
    if device == 'cpu':
        return resident_bytes('VmHWM') - before
    return torch.cuda.max_memory_allocated() - before


def peak_bytes(
    model: nn.Module, call: Callable[[], Any], device: str, times: int = 1
) -> int:
    """Weights and buffers of a model, and what calls of it add."""
    weights = itertools.chain(model.parameters(), model.buffers())
    return added_bytes(call, device, times) + sum(x.nbytes for x in weights)


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of a module returns in a new process."""
    spawn = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, spawn) as process:
        return process.submit(function, *args).result()
