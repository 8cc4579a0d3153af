"""Prove that training survives: kill it at random points, go on, compare the bits.

``python tools/prove_resume.py --data data/demo`` trains tiny models with both kinds of
loops, in one process and in two: once without an interruption, and with kills at random
moments, kills inside the writing of checkpoints, and the signals that people and slurm
send. After each the run goes on as by tools/train.py --resume. In the end weights,
averages, optimizer, schedules, losses and random states have to be the same bits.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import add_out, find_out, machine, save
from mmengine.fileio import LocalBackend

from mmdgt.commands import run_command
from mmdgt.openmmlab.apis.config import load_config, make_parser
from mmdgt.openmmlab.apis.runner import build_runner
from mmdgt.openmmlab.engine import Interrupted, checkpointing

CONFIGS = Path(__file__).parents[1] / 'configs'
ARCH = 'dict(dims=(16, 32, 64, 64), depths=(1, 1, 2, 1), num_heads=(2, 2, 4, 4),'
ARCH += ' stem_dims=8, _delete_=True)'
COMMON = f"""
optim_wrapper = dict(type='BFloat16OptimWrapper')
train_dataloader = dict(batch_size=2, num_workers=2)
default_hooks = dict(
    logger=dict(interval=1), ema=dict(type='EMAHook', momentum=0.1),
    checkpoint=dict(interval={{interval}}, max_keep_ckpts=1),
)
backbone = dict(arch={ARCH}, num_keys=20, drop_path_rate=0.2)
val_cfg = val_dataloader = val_evaluator = None
"""
RUNS = {
    'segmentation, by iterations': (
        'upernet_dgt_t_demo',
        'ade20k',
        'iter_16.pth',
        COMMON.format(interval=4)
        + """
model = dict(
    backbone=backbone,
    decode_head=dict(in_channels=[16, 32, 64, 64], channels=16),
    auxiliary_head=dict(in_channels=64, channels=16),
)
train_cfg = dict(max_iters=16)
""",
    ),
    'classification, by epochs': (
        'dgt_t_demo',
        'imagenet',
        'epoch_2.pth',
        COMMON.format(interval=1)
        + """
model = dict(backbone=backbone, head=dict(in_channels=64, mid_channels=[32]))
train_dataloader = dict(
    batch_size=2, num_workers=2, dataset=dict(indices=list(range(16)))
)
train_cfg = dict(max_epochs=2)
""",
    ),
}
# Where a checkpoint is when the process is killed, and the signals that ask for an end.
IN_WRITING = ('half written', 'not yet renamed', 'not yet named the last')
SIGNALS = {'SIGTERM': signal.SIGTERM, 'SIGINT': signal.SIGINT}
KINDS = ('anywhere', *IN_WRITING, *SIGNALS)
DONE, STOPPED, FAILED = 0, 4, 5  # how a process ends


def state_of(file: Path) -> dict:
    """All of a checkpoint that has to be the same: times are not."""
    checkpoint = torch.load(file, weights_only=True)
    hub = checkpoint['message_hub']
    names = ('train/loss', 'train/lr', 'train/grad_norm')
    return dict(
        weights=checkpoint['state_dict'],
        average=checkpoint['ema_state_dict'],
        optimizer=checkpoint['optimizer'],
        schedules=checkpoint['param_schedulers'],
        random=hub['runtime_info']['state_of_training'],
        history={k: v for k, v in hub['log_scalars'].items() if k in names},
    )


def difference(one: Any, other: Any, where: str = '') -> str | None:
    """Where two nested states differ first, None if all their bits are the same."""
    if type(one) is not type(other):
        return where
    if isinstance(one, torch.Tensor):
        return None if torch.equal(one, other) else where
    if isinstance(one, (list, tuple)):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if not isinstance(one, dict):
        return None if one == other else where
    if one.keys() != other.keys():
        return where
    parts = (difference(one[key], other[key], f'{where}/{key}') for key in one)
    return next((part for part in parts if part is not None), None)


def die_in_writing(kind: str, number: int) -> None:
    """Kill this process while it writes its checkpoint of that number."""
    seen: Counter[str] = Counter()
    put, write_text = LocalBackend.put, checkpointing.write_text

    def die_at(place: str) -> None:
        seen[place] += 1
        if kind == place and seen[place] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def put_in_parts(self: LocalBackend, content: bytes, path: str) -> None:
        half = len(content) // 2
        Path(path).write_bytes(content[:half])
        die_at('half written')
        put(self, content, path)
        die_at('not yet renamed')

    def name_the_last(path: str | Path, text: str) -> None:
        die_at('not yet named the last')
        write_text(path, text)

    LocalBackend.put, checkpointing.write_text = put_in_parts, name_the_last


class Run(NamedTuple):
    """What is trained, and where."""

    config: Path
    data: Path
    work_dir: Path
    processes: int


def train(run: Run, place: dict, kill: tuple) -> None:
    """What ``tools/train.py CONFIG --resume`` does, in a process of its own."""
    os.setpgid(0, 0)  # with its workers
    log = os.open(f'{run.work_dir}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= place
    options = ('--work-dir', run.work_dir, '--cfg-options', f'data_root={run.data}')
    launcher = ('--launcher', 'pytorch') if place else ()
    arguments = map(str, (run.config, *launcher, *options))
    cfg = load_config(make_parser('').parse_args(arguments))
    cfg.resume = True
    if kill[0] in IN_WRITING and place.get('RANK', '0') == '0':
        die_in_writing(*kill)
    status = FAILED
    try:
        run_command(lambda: build_runner(cfg).train())
        status = DONE
    except Interrupted:
        status = STOPPED
    except (Exception, SystemExit):
        traceback.print_exc()
    if place and status != FAILED:
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(status)


def kill_group(process: BaseProcess, number: int) -> None:
    """Send a signal to a process and its workers, those that are left."""
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def attempt(
    run: Run, kill: tuple = ('never', 0), wait: float | None = None
) -> int | None:
    """Train to the end, or until it is killed; returns how the first process ended."""
    places: list[dict[str, str]] = [{}]
    if run.processes > 1:
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = str(probe.getsockname()[1])
        group = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        group['WORLD_SIZE'] = str(run.processes)
        ranks = map(str, range(run.processes))
        places = [dict(group, RANK=rank, LOCAL_RANK=rank) for rank in ranks]
    fork = multiprocessing.get_context('fork')
    trains = [fork.Process(target=train, args=(run, p, kill)) for p in places]
    for process in trains:
        process.start()
    first = trains[0]
    first.join(wait)
    if first.is_alive():
        for process in trains:
            kill_group(process, SIGNALS.get(kill[0], signal.SIGKILL))
        first.join()
    for process in trains:
        if first.exitcode not in (DONE, STOPPED):  # and workers that are left
            kill_group(process, signal.SIGKILL)
        process.join()
    return first.exitcode


def end_of_log(run: Run) -> str:
    """Its last lines, for the folder goes with this process."""
    return '\n'.join(Path(f'{run.work_dir}.log').read_text().splitlines()[-50:])


def prove(run: Run, last: str, kills: int) -> dict:
    """Train without and with interruptions, and compare.

    Raises:
        RuntimeError: If a run failed or ended with other bits.
    """
    whole = run._replace(work_dir=run.work_dir / 'whole')
    start = time.perf_counter()
    if attempt(whole) != DONE:
        raise RuntimeError(f'it failed without a kill:\n{end_of_log(whole)}')
    seconds = time.perf_counter() - start
    expected = state_of(whole.work_dir / last)
    done: Counter[str] = Counter()
    compared, ended = 0, True
    while done.total() < kills or not ended:
        part = run._replace(work_dir=run.work_dir / f'killed_{compared}')
        kind, wait = 'never', None
        if done.total() < kills:
            kind = KINDS[done.total() % len(KINDS)]
            if kind not in IN_WRITING:
                wait = random.uniform(0, seconds)
        status = attempt(part, (kind, random.randint(1, 2)), wait)
        if status == FAILED:
            raise RuntimeError(f'it failed after {kind}:\n{end_of_log(part)}')
        if ended := status == DONE:
            compared += 1
            where = difference(expected, state_of(part.work_dir / last))
            if where is not None:
                raise RuntimeError(f'{part.work_dir} differs in {where}')
        else:
            done[kind] += 1
        print(f'  {kind}: {"end, the same bits" if ended else status}', flush=True)
    return dict(kills=dict(done), compared=compared, same_bits=True)


def main() -> None:
    """Prove it for every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data', type=Path, default='data/demo', help='demo data')
    parser.add_argument('--kills', type=int, default=20, help='in each of the runs')
    parser.add_argument('--seed', type=int, default=0)
    add_out(parser, Path('docs/reliability/resume.json'), 'the JSON')
    args = parser.parse_args()
    out = find_out(parser, args)
    random.seed(args.seed)
    torch.set_num_threads(1)  # before processes are forked
    import_module('mmseg.models')  # once for all of them
    import_module('mmpretrain.models')
    where, results = machine('cpu'), []  # before a result changes the tree
    with tempfile.TemporaryDirectory() as folder:
        for name, (base, data, last, changes) in RUNS.items():
            for processes in (1, 2):
                print(f'{name}, {processes} processes', flush=True)
                work_dir = Path(folder, f'{base}_{processes}')
                work_dir.mkdir()
                config = work_dir / 'config.py'
                config.write_text(f'_base_ = {str(CONFIGS / f"{base}.py")!r}{changes}')
                run = Run(config, (args.data / data).resolve(), work_dir, processes)
                found = prove(run, last, args.kills)
                results.append(dict(run=name, processes=processes, **found))
                save(out, where, results=results)


if __name__ == '__main__':
    run_command(main)
