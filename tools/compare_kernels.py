"""Time the kernels of two checkouts in turns, whole passes and kernel by kernel.

    python tools/compare_kernels.py build/base . --out work_dirs/kernels.jsonl

Each checkout, with its extension built in place, is served by a process of its own, and
the two take turns, so that a change of clocks meets both. A pass is what the attention
layer does between its projections: 'inference'; 'forward', as in training, with the
terms of eq. 3; 'backward'; 'step', the last two. Every row is written as soon as it is
measured, the ones that matter most first. The rates come before them: what this GPU
copies, gathers and multiplies, to judge the times by.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from benchmark_op import SETS, Inputs, captured, draw_inputs
from measure import TURN, add_words, added_bytes, machine, repeat, seconds, summary
from torch import Tensor

if TYPE_CHECKING:
    from mmdgt import DynamicGroupAttention

PASSES = ('inference', 'forward', 'backward', 'step')
TREES = ('base', 'candidate')


def layer_of(inputs: Inputs) -> 'DynamicGroupAttention':
    """The attention layer without its projections, on (query, key, value)."""
    from mmdgt import DynamicGroupAttention

    class BetweenProjections(DynamicGroupAttention):
        def project(self, x: Any) -> tuple:
            return *x.parts, None

        def join(self, out: Tensor, shape: Any) -> Tensor:
            return out

    H, G, D = inputs.centroids.shape
    layer = BetweenProjections(H * D, H, G, inputs.num_keys)
    layer.centroids = inputs.centroids
    layer.moved = True
    return layer.to(inputs.query.device)


def make_call(
    layer: 'DynamicGroupAttention', inputs: Inputs, which: str
) -> Callable[[], Any]:
    """What to time."""
    layer.train(which != 'inference')
    parts = [x.detach().requires_grad_(which != 'inference') for x in inputs[:3]]
    x: Any = SimpleNamespace(parts=parts, shape=None)
    if which in ('inference', 'forward'):
        return lambda: layer(x)
    if which == 'backward':
        out = layer(x)
        return lambda: torch.autograd.grad(out, parts, inputs.grad, retain_graph=True)
    return lambda: torch.autograd.grad(layer(x), parts, inputs.grad)


def times_of_kernels(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Microseconds of every kernel (on a CPU: operator) that a call starts."""
    kinds = torch.profiler.ProfilerActivity
    kind = kinds.CUDA if device == 'cuda' else kinds.CPU
    calls = 10 if device == 'cuda' else 1
    with torch.profiler.profile(activities=[kind]) as profile:
        repeat(call, calls)
        if device == 'cuda':
            torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profile.key_averages():
        spent = getattr(
            event, f'self_{"device" if device == "cuda" else "cpu"}_time_total'
        )
        name = event.key.removeprefix('void ').split('(anonymous namespace)::', 1)[-1]
        name = name.split('<')[0].split('(')[0]
        if spent > 0:
            times[name] = round(times.get(name, 0) + spent / calls, 2)
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def rates(device: str) -> Iterator[dict]:
    """What the device does best: bytes and operations a second."""
    many = 1 << (30 if device == 'cuda' else 24)
    source = torch.zeros(many, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if device == 'cuda' else 256
    square = torch.randn(side, side, device=device).bfloat16()
    rows = torch.randn(1 << 17, 32, device=device).bfloat16()  # 8 MB stay in the L2
    which = torch.randint(len(rows), (1 << 22 if device == 'cuda' else 1 << 16,))
    which = which.to(device)
    amounts: dict[str, tuple[Callable[[], Any], int]] = {
        'copy, read and written bytes': (lambda: target.copy_(source), 2 * many),
        'gathered bytes of cached rows': (lambda: rows[which], which.numel() * 64),
        'bfloat16 operations': (lambda: square @ square, 2 * side**3),
    }
    for name, (call, amount) in amounts.items():
        call()
        best = min(seconds(call, device) for _ in range(5))
        yield {'rate': name, 'per_second': float(f'{amount / best:.4g}')}


def run_once(sets: Iterable[str], device: str) -> None:
    """Run every case of the sets once, for a profiler."""
    for name in sets:
        inputs = draw_inputs(SETS[name], 'random', torch.bfloat16, device, 0)
        for which in ('inference', 'step'):
            with torch.set_grad_enabled(which == 'step'):
                make_call(layer_of(inputs), inputs, which)()


def serve(device: str) -> None:
    """Answer the lines of JSON on standard input, one by one."""
    stream = torch.cuda.stream(torch.cuda.Stream()) if device == 'cuda' else None
    if stream:  # the default stream cannot be captured
        stream.__enter__()
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print goes to standard error
    timed: Any = None
    answer: Any
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if 'rates' in asked:
                answer = list(rates(device))
            elif 'repeats' in asked:
                turn = functools.partial(repeat, timed, asked['repeats'])
                answer = seconds(turn, device) / asked['repeats']
            else:
                timed = None  # frees the last case
                answer, timed = prepare(asked, device)
        except Exception as error:
            answer = {'error': f'{type(error).__name__}: {error}'.splitlines()[0][:300]}
        answers.write(json.dumps(answer) + '\n')
        answers.flush()


def prepare(case: dict, device: str) -> tuple[dict, Callable[[], None]]:
    """What is measured once of a case, and the call to time."""
    shape = SETS[case['set']]
    shape = shape._replace(B=case['batch'] or shape.B)
    size = 4 * shape.B * shape.H * shape.L * 64
    # Together the buffers exceed the caches several times over.
    buffers = 1 if device == 'cpu' else min(8, max(2, (256 << 20) // size))
    inputs = [
        draw_inputs(shape, case['draw'], torch.bfloat16, device, seed)
        for seed in range(buffers)
    ]
    calls = [make_call(layer_of(x), x, case['pass']) for x in inputs]
    with torch.set_grad_enabled(case['pass'] != 'inference'):
        calls[0]()
        answer: dict[str, Any] = {
            **shape._asdict(),
            'buffers': buffers,
            'kernels': times_of_kernels(calls[0], device),
        }
        if device == 'cuda':
            answer['peak_bytes'] = added_bytes(calls[0], device)
            call = captured(calls)
        else:
            call = calls[0]
    grad = case['pass'] != 'inference'

    def run() -> None:
        with torch.set_grad_enabled(grad):
            call()

    run()
    answer['once'] = min(seconds(run, device) for _ in range(2))
    return answer, run


class Server:
    """A process that serves a checkout."""

    def __init__(self, folder: str, device: str) -> None:
        command = [sys.executable, __file__, '--serve', '--device', device]
        paths = [str(Path(folder).resolve()), str(Path(__file__).resolve().parent)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths)},
        )

    def ask(self, **question: Any) -> Any:
        """The answer; a dictionary with 'error' where there is none."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(question) + '\n')
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ''
        return json.loads(line) if line else {'error': 'the process has ended'}


def compare(
    servers: dict[str, Server], case: dict, rounds: int, budget: float
) -> list[dict]:
    """Rows of one case, one a checkout."""
    rows: dict[str, dict] = {}
    turns: dict[str, tuple[int, int]] = {}
    for tree, server in servers.items():
        answer = server.ask(**case)
        rows[tree] = {**case, 'tree': tree, **answer}
        if 'error' not in answer:
            once = rows[tree].pop('once')
            repeats = max(1, round(TURN / once))
            turns[tree] = repeats, int(min(rounds, max(3, budget / (once * repeats))))
    times: dict[str, list[float]] = {tree: [] for tree in turns}
    for turn in range(rounds):
        for tree, (repeats, most) in turns.items():
            if turn < most and 'error' not in rows[tree]:
                answer = servers[tree].ask(repeats=repeats)
                if isinstance(answer, dict):
                    rows[tree] |= answer
                else:
                    times[tree].append(answer)
    for tree, taken in times.items():
        if taken:
            scale = 1e6 / rows[tree].pop('buffers')
            rows[tree] |= summary(sorted(taken), 'us', scale)
    return list(rows.values())


def main() -> None:
    """Compare what the command line asks for."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folders', nargs='*', help='base and candidate')
    add_words(parser, '--sets', SETS, 'A3,A,C,B,B3,C3')
    add_words(parser, '--draws', ('random', 'skewed', 'one'), 'random')
    add_words(parser, '--passes', PASSES, ','.join(PASSES))
    parser.add_argument('--batch', type=int, default=0, help="in place of the sets' B")
    parser.add_argument('--device', default='cuda' if cuda else 'cpu')
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--budget', type=float, default=0.2, help='seconds a row')
    parser.add_argument(
        '--seconds', type=float, default=1e9, help='no case begins after so many'
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/kernels.jsonl'))
    parser.add_argument(
        '--once', action='store_true', help='run each case once and measure nothing'
    )
    parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.device)
    if args.once:
        return run_once(args.sets, args.device)

    began = time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    servers = {
        tree: Server(folder, args.device)
        for tree, folder in zip(TREES, args.folders, strict=True)
    }
    with args.out.open('w') as file:

        def write(row: dict) -> None:
            file.write(json.dumps(row) + '\n')
            file.flush()
            shown = {k: row[k] for k in row if k not in ('kernels', 'machine')}
            print(*shown.values(), flush=True)

        write({'machine': machine(args.device)})
        rows = servers['candidate'].ask(rates=True)
        for row in rows if isinstance(rows, list) else [rows]:
            write(row)
        for name in args.sets:
            for draw in args.draws:
                for which in args.passes:
                    if time.monotonic() - began > args.seconds:
                        sys.exit(f'no time left for {name} {draw} {which}')
                    case = {
                        'set': name,
                        'draw': draw,
                        'pass': which,
                        'batch': args.batch,
                    }
                    for row in compare(servers, case, args.rounds, args.budget):
                        write(row)
    for server in servers.values():
        server.process.communicate()  # closes its input, at which it ends


if __name__ == '__main__':
    main()
