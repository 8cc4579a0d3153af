"""Time training steps beside other processes, with several settings of OpenMP.

    python tools/benchmark_neighbours.py --out docs/benchmarks/neighbours.json

The load is one process that computes without end: none, one at the lowest priority, one
at the same. A setting is a value of GOMP_SPINCOUNT, how long a thread that waits for
others tries before it sleeps, "bound", where every thread stays on a core of its own
(OMP_PROC_BIND), both with a + between them, or "default". Every row has the median time
of a step, how long the threads computed (or span), how long they waited for a core, and
how often they slept.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmark_model import BACKBONES, Case, prepare
from measure import add_words, machine, output_file, print_columns, save

# On any core, though a bound process starts it on its own.
BUSY = """
import os
os.sched_setaffinity(0, range(os.cpu_count()))
while True: pass
"""
VARIABLES = ('GOMP_SPINCOUNT', 'OMP_PROC_BIND')
LOADS = {'none': None, 'niced': ['nice', '-n', '19'], 'equal': []}
DEFAULT, BOUND = 'default', 'bound'


def environment(setting: str) -> dict[str, str]:
    """The variables of a process with a setting."""
    rest = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    for part in setting.split('+'):
        if part == BOUND:
            rest['OMP_PROC_BIND'] = 'true'
        elif part != DEFAULT:
            rest['GOMP_SPINCOUNT'] = str(int(part))
    return rest


def usage() -> dict[str, float]:
    """What the threads of this process took so far, after /proc/PID/schedstat."""
    ran = waited = slept = 0
    for task in Path('/proc/self/task').iterdir():
        ran_ns, waited_ns, _ = map(int, (task / 'schedstat').read_text().split())
        status = dict(
            line.split(':\t', 1) for line in (task / 'status').read_text().splitlines()
        )
        ran, waited = ran + ran_ns, waited + waited_ns
        slept += int(status['voluntary_ctxt_switches'])
    return {'ran_s': ran / 1e9, 'waited_s': waited / 1e9, 'slept': slept}


def serve(model: str, steps: int) -> None:
    """Print a row for every load; in a process of its own for every setting."""
    _, step = prepare(
        Case('backbone', (224, 224), 4, 'train', 'float32', 'contiguous', model, ''),
        'cpu',
    )
    for _ in range(2):
        step()
    for load, priority in LOADS.items():
        command = [*(priority or []), sys.executable, '-c', BUSY]
        neighbour = None if priority is None else subprocess.Popen(command)
        try:
            time.sleep(0.5)
            step()
            before, times = usage(), []
            for _ in range(steps):
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
            spent = {
                key: round((value - before[key]) / steps, 3)
                for key, value in usage().items()
            }
        finally:
            if neighbour:
                neighbour.kill()
                neighbour.wait()
        median = round(statistics.median(times), 3)
        spread = [round(min(times), 3), round(max(times), 3)]
        row = dict(model=model, load=load, step_s=median, range_s=spread, **spent)
        print(json.dumps(row), flush=True)


def main() -> None:
    """Measure all settings, one after the other, several times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_words(parser, '--models', BACKBONES, 'dgt_t,swin_t')
    parser.add_argument('--settings', default=f'{DEFAULT},5000,{BOUND}')
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--steps', type=int, default=6, help='of a round')
    parser.add_argument('--out', type=output_file)
    parser.add_argument('--serve', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.steps)
    rows = []
    settings = args.settings.split(',')
    runs = itertools.product(range(args.rounds), settings, args.models)
    for _, setting, model in runs:
        serving = ['--serve', model, '--steps', str(args.steps)]
        done = subprocess.run(
            [sys.executable, __file__, *serving],
            env=environment(setting),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        lines = done.stdout.splitlines()
        rows += [{'setting': setting, **json.loads(x)} for x in lines]
    rows.sort(key=lambda row: (row['model'], list(LOADS).index(row['load'])))
    print_columns([list(rows[0]), *([str(x) for x in row.values()] for row in rows)])
    if args.out:
        about = machine('cpu')
        for name in VARIABLES:
            about.pop(name, None)
        save(args.out, about | {'cores': os.cpu_count()}, rows=rows)


if __name__ == '__main__':
    main()
