"""What the benchmarks share: times, peak memory, the machine, tables, files."""

import argparse
import contextlib
import ctypes
import functools
import itertools
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmdgt.files import write_json

TURN = 0.02  # seconds, about the least that a turn lasts
PACKAGES = ('mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg', 'timm')
# Variables of the environment that change times.
SETTINGS = (
    'OMP_NUM_THREADS',
    'GOMP_SPINCOUNT',
    'OMP_PROC_BIND',
    'THP_MEM_ALLOC_ENABLE',
    # Limits of the instruction sets, as of another machine.
    'ATEN_CPU_CAPABILITY',
    'ONEDNN_MAX_CPU_ISA',
    'MKL_ENABLE_INSTRUCTIONS',
)


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


def output_folder(text: str) -> Path:
    """A folder, there from the start: not when hours of timing are to be written."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f'expected a folder to write to: {error}'
        raise argparse.ArgumentTypeError(message) from None
    return Path(text)


def output_file(text: str) -> Path:
    """A file that can be written, in a folder that is there from the start."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(
            f'expected a file to write, {text} is a folder'
        )
    return output_folder(str(Path(text).parent)) / Path(text).name


def add_out(
    parser: argparse.ArgumentParser,
    default: Path,
    what: str,
    kind: Callable[[str], Path] = output_file,
) -> None:
    """--out, and --force, without which what is at its default is not replaced."""
    parser.add_argument('--out', type=kind, help=f'{what}; by default {default}')
    parser.add_argument(
        '--force', action='store_true', help='replace what is there by default'
    )
    parser.set_defaults(committed=default)


def find_out(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Path:
    """Where results go; ends the command if they would replace committed ones."""
    found = args.committed.exists() or Path(f'{args.committed}.json').exists()
    if args.out is None and found and not args.force:
        parser.error(
            f'{args.committed} has results already: replace them with --force, or name'
            f' another place with --out'
        )
    return args.out or args.committed


def seconds(call: Callable[[], Any], device: str) -> float:
    """How long a call takes."""
    if device == 'cpu':
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


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
    times: dict[Any, list[float]] = {name: [] for name in calls}
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


def machine(device: str) -> dict:
    """What was measured on, and with which versions."""
    system = f'{platform.system()}-{platform.machine()}'
    info: dict[str, Any] = {'platform': system, 'torch': torch.__version__}
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
        with contextlib.suppress(OSError):
            done = subprocess.run(query, capture_output=True, text=True)
            info['driver'] = done.stdout.strip()
    else:
        info['cpu'] = processor()
        info['instructions'] = torch.backends.cpu.get_cpu_capability()
        info['threads'] = torch.get_num_threads()
        pages = Path('/sys/kernel/mm/transparent_hugepage/enabled')
        if pages.exists():  # such as "always [madvise] never"
            info['large_pages'] = pages.read_text().split('[')[1].split(']')[0]
    return info | revision() | {'versions': versions()}


def processor() -> str:
    """Name, family and model: hosts of virtual machines cut names down to the make."""
    about = Path('/proc/cpuinfo')
    if not about.exists():
        return platform.processor()
    values = dict(re.findall(r'(.+?)\s*: (.+)', about.read_text().split('\n\n')[0]))
    named = (('model name', ''), ('cpu family', 'family '), ('model', 'model '))
    parts = [prefix + values[key] for key, prefix in named if key in values]
    return ', '.join(parts) or platform.machine()


def revision() -> dict:
    """The commit of this file, and whether nothing differed from it.

    Empty where git does not know the file, as when it was installed by a wheel, though
    it may lie in a repository of something else.
    """
    file = Path(__file__).resolve()

    def git(*command: str | Path) -> str:
        done = subprocess.run(
            ['git', *command],
            cwd=file.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    try:
        git('ls-files', '--error-unmatch', file)
        commit = git('rev-parse', 'HEAD')
        changed = git('status', '--porcelain', '--untracked-files=no')
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {'commit': commit, 'clean': not changed}


def versions() -> dict[str, str]:
    """Of the packages that hold models, by their distributions' names."""
    carried = metadata.packages_distributions()
    return {
        name: metadata.version(name)
        for package in PACKAGES
        for name in carried.get(package, ())
    }


def print_columns(table: list[list[str]]) -> None:
    """Lines of cells, every column as wide as it must be."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = zip(line, widths, strict=True)
        print('  '.join(cell.rjust(width) for cell, width in cells))


def save(path: Path, about: dict, **results: list[dict]) -> None:
    """Write results and what they were measured on."""
    write_json(path, {'machine': about, **results})
