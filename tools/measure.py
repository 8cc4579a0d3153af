"""What the benchmarks share: times taken in turns, the machine, tables and files."""

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

TURN = 0.02  # seconds, about the least that a turn lasts
# Variables of the environment that change times.
SETTINGS = ('OMP_NUM_THREADS', 'GOMP_SPINCOUNT', 'THP_MEM_ALLOC_ENABLE')


def add_words(
    parser: argparse.ArgumentParser, name: str, known: Collection[str], default: str
) -> None:
    """An argument that takes some of the known words, with commas between them."""

    def words(text: str) -> list[str]:
        found = [word for word in text.split(',') if word]
        unknown = sorted(set(found) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(
                f'{", ".join(unknown)}: choose from {", ".join(known)}'
            )
        return found

    parser.add_argument(name, type=words, default=default, help=', '.join(known))


def seconds(call: Callable[[], Any], device: str) -> float:
    """How long a call takes."""
    if device == 'cpu':
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_turns(
    calls: dict[Any, Callable[[], Any]], device: str, rounds: int, budget: float
) -> dict[Any, list[float]]:
    """Time calls that take turns, so that a change of clocks meets them all.

    A short call is repeated within its turn, or what the one before left in caches
    and allocators would be most of its time.

    Args:
        calls (dict): Name to call, warmed up.
        device (str): 'cpu' or 'cuda'.
        rounds (int): Turns that every call takes at most.
        budget (float): Seconds after which a call stops, yet not before its third
            turn.

    Returns:
        dict: Name to its times in seconds, each the mean of a turn, ascending.
    """
    once = {
        name: min(seconds(call, device) for _ in range(2))
        for name, call in calls.items()
    }
    repeats = {name: max(1, round(TURN / spent)) for name, spent in once.items()}
    turns = {
        name: int(min(rounds, max(3, budget / (spent * repeats[name]))))
        for name, spent in once.items()
    }
    times = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            if turn < turns[name]:
                again = functools.partial(repeat, call, repeats[name])
                times[name].append(seconds(again, device) / repeats[name])
    return {name: sorted(taken) for name, taken in times.items()}


def repeat(call: Callable[[], Any], times: int) -> None:
    """Call one time after the other."""
    for _ in range(times):
        call()


def summary(times: list[float], unit: str, per_second: float) -> dict:
    """Median, quartiles and number of ascending times, in the unit."""
    taken = [t * per_second for t in times]
    return {
        unit: round(statistics.median(taken), 2),
        f'{unit}_quartiles': [round(taken[len(taken) * q // 4], 2) for q in (1, 3)],
        'rounds': len(taken),
    }


def machine(device: str) -> dict:
    """What was measured on, and with which versions."""
    info = {'platform': platform.platform(), 'torch': torch.__version__}
    info |= {name: os.environ[name] for name in SETTINGS if name in os.environ}
    if device == 'cuda':
        properties = torch.cuda.get_device_properties(0)
        info |= {
            'gpu': properties.name,
            'multiprocessors': properties.multi_processor_count,
            'cuda': torch.version.cuda,
            'cudnn': torch.backends.cudnn.version(),
        }
        query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    else:
        query = ['sh', '-c', 'grep -m1 "model name" /proc/cpuinfo']
        info['threads'] = torch.get_num_threads()
    for key, command in (
        ('driver' if device == 'cuda' else 'cpu', query),
        ('commit', ['git', 'rev-parse', 'HEAD']),
    ):
        with contextlib.suppress(OSError):
            done = subprocess.run(command, capture_output=True, text=True)
            info[key] = done.stdout.strip().split(': ')[-1]
    return info


def print_columns(table: list[list[str]]) -> None:
    """Lines of cells, every column as wide as it must be."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = zip(line, widths, strict=True)
        print('  '.join(cell.rjust(width) for cell, width in cells))


def save(path: Path, about: dict, **results: list[dict]) -> None:
    """Write results and what they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({'machine': about, **results}, indent=1) + '\n')
