"""Time DG-Attention against its rivals, on the GPU or the CPU.

    python tools/benchmark_op.py --sets A,B,C --draws random,one --out docs/benchmarks

All rivals read the same tensors, views of one (B, L, 3, H, D) projection, and take
turns, so that a change of clocks meets them all. Times are medians per call, of turns
that repeat a short call. On the GPU calls are replayed as CUDA graphs over several
buffers where that works. Memory is what one call adds to the inputs at its peak, on the
CPU in a process of its own.
"""

import argparse
import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import (
    add_words,
    added_bytes,
    in_fresh_process,
    in_turns,
    machine,
    output_folder,
    print_columns,
    save,
    summary,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdgt.commands import run_command
from mmdgt.files import whole_file
from mmdgt.ops import assign_queries, group_attention, select_keys, use_backend
from mmdgt.ops.library import ops

D, G = 32, 48


class Shape(NamedTuple):
    """Letters as everywhere: batch, heads, tokens, keys per group."""

    B: int
    H: int
    L: int
    K: int


SETS = {
    'A': Shape(128, 2, 3136, 98),  # ImageNet, stage 1
    'A3': Shape(128, 8, 196, 98),  # ImageNet, stage 3
    'B': Shape(2, 2, 16384, 392),  # ADE20K crop, stage 1
    'B3': Shape(2, 8, 1024, 392),  # ADE20K crop, stage 3
    'C': Shape(2, 2, 64000, 392),  # COCO 800 x 1280, stage 1
    'C3': Shape(2, 8, 4000, 392),  # COCO 800 x 1280, stage 3
    'E': Shape(1, 2, 65536, 392),  # ADE20K evaluation 512 x 2048, stage 1
    'cpu196': Shape(4, 8, 196, 98),
    'cpu3136': Shape(1, 2, 3136, 98),
    'cpu16384': Shape(1, 2, 16384, 392),
    'cpu64000': Shape(1, 2, 64000, 392),
}


class Inputs(NamedTuple):
    """query, key, value and grad (B, H, L, D); centroids (H, G, D)."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    centroids: Tensor
    num_keys: int


def draw_inputs(
    shape: Shape, draw: str, dtype: torch.dtype, device: str, seed: int
) -> Inputs:
    """Random tensors whose groups are of the sizes that ``draw`` names."""
    B, H, L, K = shape
    rng = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=rng)

    centroids = F.normalize(randn(H, G, D), dim=-1)
    qkv, grad = randn(B, L, 3, H, D), randn(B, L, H, D)
    head = torch.arange(H, device=device)
    if draw == 'skewed':  # a few large groups and many small ones
        weight = (1.5 * randn(G)).softmax(0)
        group = torch.multinomial(weight, B * L * H, True, generator=rng)
        toward = centroids[head, group.view(B, L, H)]
        qkv[:, :, 0] = 0.6 * qkv[:, :, 0] + 4 * toward
    elif draw == 'one':
        qkv[:, :, 0] = 3 * centroids[:, 7] + 0.02 * qkv[:, :, 0]
    query, key, value = qkv.to(dtype).permute(2, 0, 3, 1, 4)
    return Inputs(query, key, value, grad.to(dtype).transpose(1, 2), centroids, K)


def grouped(x: Inputs, backend: str) -> Tensor:
    """Assignment, selection and attention by a back end."""
    with use_backend(backend):
        group = assign_queries(x.query, x.centroids)
        index = select_keys(x.key, x.centroids, x.num_keys, sorted=False)
        return group_attention(*x[:3], group, index, check_range=False)


def fused(x: Inputs) -> Tensor:
    """The compiled operators."""
    return grouped(x, 'fused')


def eager(x: Inputs) -> Tensor:
    """The plain PyTorch reference."""
    return grouped(x, 'reference')


def dense(x: Inputs, backend: SDPBackend | None = None) -> Tensor:
    """Attention of all queries to all keys."""
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        return F.scaled_dot_product_attention(*x[:3])


def group_loop(x: Inputs) -> Tensor:
    """Topk, argmax and one small attention per group, for the CPU."""
    query, key, value = x[:3]
    with torch.no_grad():
        group = (query.float() @ x.centroids.mT).argmax(-1)
        index = (x.centroids @ key.float().mT).topk(x.num_keys).indices
    out = torch.empty_like(query)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for g in range(G):
                rows = (group[b, h] == g).nonzero().squeeze(-1)
                k, v = key[b, h, index[b, h, g]], value[b, h, index[b, h, g]]
                scores = query[b, h, rows] @ k.mT * D**-0.5
                out[b, h, rows] = scores.softmax(-1) @ v
    return out


def stock(x: Inputs) -> Tensor:
    """The best that stock parts give: matmul, topk, argsort, gathers, varlen."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = x[:3]
    B, H, L, _ = query.shape
    with torch.no_grad():
        centroids = x.centroids.to(query.dtype)
        group = (query @ centroids.mT).argmax(-1)  # (B, H, L)
        index = (centroids @ key.mT).topk(x.num_keys, sorted=False).indices
        order = group.argsort(-1)
        head = torch.arange(B * H, device=query.device)
        sizes = torch.zeros(B * H * G, dtype=torch.int32, device=query.device)
        flat = (group.flatten(0, 1) + G * head[:, None]).flatten()
        sizes.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        ends = F.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
        key_ends = torch.arange(B * H * G + 1, dtype=torch.int32, device=query.device)
        rank = order.argsort(-1)

    # (B, H, L, D), (B, H, N) -> (B H N, 1, D)
    def rows(tokens: Tensor, which: Tensor) -> Tensor:
        which = which.unsqueeze(-1).expand(*which.shape, D)
        return tokens.gather(2, which).reshape(-1, 1, D)

    chosen = index.flatten(2)
    out: Any = varlen_attn(
        rows(query, order),
        rows(key, chosen),
        rows(value, chosen),
        ends,
        key_ends * x.num_keys,
        L,
        x.num_keys,
    )
    return rows(out.view(B, H, L, D), rank).view(B, H, L, D)


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(x: Inputs) -> Tensor:
    """FlexAttention that masks the keys of other groups."""
    with torch.no_grad():
        group = ops.assign_queries(x.query, x.centroids, False)[0]
        index = ops.select_keys(x.key, x.centroids, x.num_keys, False).long()
        B, H, L = group.shape
        seen = torch.zeros(B, H, G, L, dtype=torch.bool, device=group.device)
        seen.scatter_(-1, index, True)

    def mask(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(seen[b, h, group[b, h, i], j], score, -float('inf'))

    return _compiled_flex()(*(t.contiguous() for t in x[:3]), score_mod=mask)


@functools.cache
def _compiled_eager() -> Callable:
    return torch.compile(eager, dynamic=False)


def compiled(x: Inputs) -> Tensor:
    """The reference under torch.compile."""
    return _compiled_eager()(x)


RIVALS: dict[str, Callable[[Inputs], Tensor]] = {
    'fused': fused,
    'dense_flash': functools.partial(dense, backend=SDPBackend.FLASH_ATTENTION),
    'dense_cudnn': functools.partial(dense, backend=SDPBackend.CUDNN_ATTENTION),
    'dense': dense,
    'stock': stock,
    'flex': flex,
    'eager': eager,
    'compiled': compiled,
    'group_loop': group_loop,
}
PARTS = {
    'fused.assign': lambda x: ops.assign_queries(x.query, x.centroids, False),
    'fused.assign_sums': lambda x: ops.assign_queries(x.query, x.centroids, True),
    'fused.select': lambda x: ops.select_keys(x.key, x.centroids, x.num_keys, False),
}

CALLS = RIVALS | PARTS
LABELS = {'fused': 'these operators', 'eager': 'plain PyTorch'}  # in the plot


def make_call(run: Callable, x: Inputs, which: str) -> Callable[[], Any]:
    """What to time: the forward pass, the backward pass alone, or both."""
    if which == 'forward':

        def forward() -> Any:
            with torch.no_grad():
                return run(x)

        return forward
    leaves = [t.detach().requires_grad_() for t in x[:3]]
    tracked = x._replace(query=leaves[0], key=leaves[1], value=leaves[2])
    if which == 'backward':
        out = run(tracked)
        return lambda: torch.autograd.grad(out, leaves, x.grad, retain_graph=True)
    return lambda: torch.autograd.grad(run(tracked), leaves, x.grad)


def captured(calls: list[Callable]) -> Callable[[], Any]:
    """One function that replays all calls as a CUDA graph, if they allow it."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            # A replay reads what the calls hold, so the graph holds the calls.
            kept = calls, [call() for call in calls]
            graph.kept = kept  # type: ignore[attr-defined]
        graph.replay()
    except Exception:
        torch.cuda.synchronize()
        return lambda: [call() for call in calls]
    torch.cuda.synchronize()
    return graph.replay


def peak_of(rival: str, shape: Shape, draw: str, dtype: str, which: str) -> int:
    """The bytes beyond inputs that a call takes on the CPU, in a fresh process."""
    x = draw_inputs(shape, draw, getattr(torch, dtype), 'cpu', seed=0)
    call = make_call(CALLS[rival], x, which)
    call()  # what libraries set up once does not count
    return added_bytes(call, 'cpu')


def measure(
    args: argparse.Namespace,
    name: str,
    shape: Shape,
    draw: str,
    dtype: str,
    which: str,
) -> list[dict]:
    """Times of all rivals at one set of inputs."""
    B, H, L, _ = shape
    kind = getattr(torch, dtype)
    size = 4 * B * H * L * D * kind.itemsize
    # Together the buffers exceed the caches several times over.
    buffers = 1 if args.device == 'cpu' else min(8, max(2, (256 << 20) // size))
    inputs = [draw_inputs(shape, draw, kind, args.device, s) for s in range(buffers)]
    rows, timed = [], {}
    for rival in args.rivals:
        run = CALLS[rival]
        if rival in PARTS and which != 'forward':
            continue
        row = dict(
            set=name,
            **shape._asdict(),
            G=G,
            D=D,
            draw=draw,
            dtype=dtype,
            **{'pass': which, 'rival': rival},
        )
        try:
            calls = [make_call(run, x, which) for x in inputs]
            calls[0]()
            timed[rival] = calls[0]
            if args.device == 'cuda':
                row['peak_bytes'] = added_bytes(calls[0], 'cuda')
                timed[rival] = captured(calls)
            elif args.memory:
                case = rival, shape, draw, dtype, which
                row['peak_bytes'] = in_fresh_process(peak_of, *case)
        except Exception as error:
            timed.pop(rival, None)
            row['error'] = f'{type(error).__name__}: {error}'.splitlines()[0][:200]
        rows.append(row)
    times = in_turns(timed, args.device, args.rounds, args.budget)
    for row in rows:
        if row['rival'] in timed:
            row |= summary(times[row['rival']], 'us', 1e6 / buffers)
    return rows


def print_table(rows: list[dict], rivals: list[str]) -> None:
    """One line per set, draw, type and pass; microseconds and MiB of every rival."""
    lines: dict[tuple, dict[str, str]] = {}
    for row in rows:
        key = (row['set'], row['draw'], row['dtype'], row['pass'])
        cell = f'{row["us"]:.1f}' if 'us' in row else '-'
        if 'peak_bytes' in row:
            cell += f' / {row["peak_bytes"] / 2**20:.1f}'
        lines.setdefault(key, {})[row['rival']] = cell
    header = ['set', 'draw', 'dtype', 'pass', *rivals]
    body = [[*key, *(x.get(r, '-') for r in rivals)] for key, x in lines.items()]
    print('µs / MiB')
    print_columns([header, *body])


def plot(rows: list[dict], path: Path) -> None:
    """Time of the forward pass against L, a line per rival, data type and draw."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    draws = {row['draw'] for row in rows}
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row['pass'] == 'forward' and 'us' in row:
            rival = LABELS.get(row['rival'], row['rival'])
            label = f'{rival}, {row["dtype"]}'
            if len(draws) > 1:
                label += f', {row["draw"]}'
            lines.setdefault(label, []).append((row['L'], row['us']))
    figure, axes = plt.subplots(figsize=(6, 4.5), layout='constrained')
    for label, points in lines.items():
        axes.loglog(*zip(*sorted(points), strict=True), marker='o', label=label)
    axes.set(xlabel='tokens L of an image, two images', ylabel='forward pass, µs')
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(path) as part:
        figure.savefig(part, dpi=150)


def main() -> None:
    """Measure what the command line asks for."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choice = functools.partial(add_words, parser)
    choice('--sets', SETS, 'A,A3,B,B3,C,C3')
    parser.add_argument(
        '--lengths',
        type=lambda text: [int(length) for length in text.split(',')],
        default=[],
        help='further sets: L of B = 2, H = 2, K = 392; with them comes a plot',
    )
    choice('--draws', ('random', 'skewed', 'one'), 'random,skewed,one')
    choice('--dtypes', ('bfloat16', 'float16', 'float32', 'float64'), 'bfloat16')
    choice('--passes', ('forward', 'backward', 'both'), 'forward,backward')
    choice('--rivals', CALLS, 'fused,dense_flash,dense_cudnn,stock,eager')
    parser.add_argument('--device', default='cuda' if cuda else 'cpu')
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument(
        '--budget',
        type=float,
        default=0.5,
        help='seconds after which a slow rival stops',
    )
    parser.add_argument('--memory', action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        '--out', type=output_folder, help='folder of the JSON and the plot'
    )
    parser.add_argument('--name', default='op')
    args = parser.parse_args()

    sets = {name: SETS[name] for name in args.sets}
    sets |= {f'L{n}': Shape(2, 2, n, 392) for n in args.lengths}
    rows = []
    # Backward passes run where their forward passes ran, and the default stream
    # cannot be captured.
    stream: contextlib.AbstractContextManager = contextlib.nullcontext()
    if args.device == 'cuda':
        stream = torch.cuda.stream(torch.cuda.Stream())
    with stream:
        for name, shape in sets.items():
            for draw in args.draws:
                for dtype in args.dtypes:
                    for which in args.passes:
                        rows += measure(args, name, shape, draw, dtype, which)
                        if args.device == 'cuda':
                            torch.cuda.empty_cache()
    print_table(rows, args.rivals)
    for row in rows:
        if 'error' in row:
            print(f'{row["rival"]} at {row["set"]}: {row["error"]}')
    if args.out:
        path = args.out / f'{args.name}.json'
        save(path, machine(args.device), results=rows)
        if args.lengths:
            plot(
                [r for r in rows if r['set'].startswith('L')],
                path.with_suffix('.png'),
            )


if __name__ == '__main__':
    run_command(main)
