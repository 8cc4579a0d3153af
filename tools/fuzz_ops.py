"""Call the operators with random arguments and hold them against float64.

    python tools/fuzz_ops.py --calls 10000 --out docs/measurements/fuzz_cpu.json
    python tools/fuzz_ops.py --first 1234 --calls 1   # one call again

Every call draws from its number alone: shapes, K and G at their edges too, data type,
strides, sizes of the numbers, rows that are not finite, the threads. Choices may
differ from the expected ones by rounding alone, results by a bound that follows from
the numbers, and what is not finite must stay in the rows that saw it. The expectation
is attention under dense masks in float64, which shares nothing with the operators.
"""

import argparse
import collections
import sys
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import machine, output_file, save
from torch import Tensor

from mmdgt.commands import run_command
from mmdgt.ops import assign_and_sum, backend, group_attention, select_keys

DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Of the numbers drawn: usual, tiny (gradients underflow), large (softmax is one-hot).
MAGNITUDES = (1.0, 1.0, 1.0, 1e-4, 30.0)
LAYOUTS = ('contiguous', 'projection', 'gaps', 'transposed')
POISON = (float('nan'), float('inf'), -float('inf'))
# Rounding steps of a sum of up to 2000 products, and of an exponential.
ROUNDING = 64


class Case(NamedTuple):
    """The arguments of one call."""

    shape: tuple[int, int, int, int]  # B, H, L, D
    num_groups: int
    num_keys: int  # may exceed L
    dtype: torch.dtype
    layout: str
    magnitude: float
    poisoned: dict[int, int]  # row of key and value, number of the poison
    threads: int


def draw_case(rng: torch.Generator) -> Case:
    """All that is random but the numbers themselves."""

    def among(options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=rng))]

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=rng))

    B, H = among((0, *4 * (1, 2, 3))), between(1, 3)
    few, some, many = between(3, 40), between(41, 300), between(301, 1500)
    L = among((0, 1, 2, *3 * (few, some, many)))
    D = among((8, 16, 24, 32, 32, 32, 64, 128, 5))
    G = among((1, 2, 48, between(3, 80), 256))
    K = among((1, 2, between(1, L + 1), max(L // 2, 1), max(L, 1), L + 7))
    poisoned = {}
    if L and among((False, False, True)):
        poisoned = {between(0, L - 1): between(0, 2) for _ in range(between(1, 3))}
    dtype, magnitude = among(DTYPES), among(MAGNITUDES)
    if dtype == torch.float16:  # whose largest number gradients would exceed
        magnitude = min(magnitude, 3.0)
    layout, threads = among(LAYOUTS), between(1, 3)
    return Case((B, H, L, D), G, K, dtype, layout, magnitude, poisoned, threads)


def draw_tokens(case: Case, rng: torch.Generator) -> list[Tensor]:
    """Query, key, value and the gradient of the output, (B, H, L, D) each."""
    B, H, L, D = case.shape
    kinds = []
    for _ in range(4):
        x = (case.magnitude * torch.randn(B, L, H, D, generator=rng)).to(case.dtype)
        if case.layout == 'gaps':
            x = F.pad(x, (3, 2, 0, 1))[:, :, :H, 3 : 3 + D]
        elif case.layout == 'transposed':
            x = x.transpose(2, 3).contiguous().transpose(2, 3)
        x = x.transpose(1, 2)
        kinds.append(x.contiguous() if case.layout == 'contiguous' else x)
    if case.layout == 'projection':
        kinds[:3] = torch.stack([x.transpose(1, 2) for x in kinds[:3]], 2).unbind(2)
        kinds[:3] = [x.transpose(1, 2) for x in kinds[:3]]
    return kinds


def check_choices(
    case: Case, query: Tensor, key: Tensor, centroids: Tensor
) -> tuple[Tensor, Tensor]:
    """Run assignment and selection; return the group and the index."""
    B, H, L, _ = case.shape
    group, sums, counts = assign_and_sum(query, centroids)
    index = select_keys(key, centroids, case.num_keys, sorted=False)
    K = min(case.num_keys, L)
    assert group.shape == (B, H, L) and index.shape == (B, H, case.num_groups, K)
    if B * L == 0:
        assert not counts.any() and not sums.any()
        return group, index
    step = ROUNDING * torch.finfo(torch.float32).eps
    scores = query.double() @ centroids.double().mT
    chosen = scores.gather(-1, group.long().unsqueeze(-1))
    near = step * query.double().norm(dim=-1, keepdim=True)
    assert (chosen >= scores.amax(-1, keepdim=True) - near).all(), 'a farther centroid'

    member = F.one_hot(group.long(), case.num_groups)
    assert torch.equal(counts, member.sum((0, 2)).int()), 'counts'
    unit = F.normalize(query.double(), dim=-1)
    expected = torch.einsum('bhlg,bhld->hgd', member.double(), unit)
    assert (sums - expected).abs().max() <= step * B * L, 'sums'

    scores = (key.double() @ centroids.double().mT).mT  # (B, H, G, L)
    near = step * key.double().norm(dim=-1).amax()
    taken = torch.zeros_like(scores).scatter(-1, index.long(), 1.0)
    assert taken.sum(-1).eq(K).all(), 'a token twice'
    least = scores.masked_fill(taken == 0, torch.inf).amin(-1)
    left = scores.masked_fill(taken == 1, -torch.inf).amax(-1)
    assert (least >= left - 2 * near).all(), 'a lower key'
    return group, index


def attend_densely(
    tokens: list[Tensor], group: Tensor, index: Tensor, scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and three gradients in float64, and by how much they may differ."""
    dtype = tokens[0].dtype
    query, key, value, grad = (x.detach().double() for x in tokens)
    L = query.shape[2]
    seen = torch.zeros(*index.shape[:3], L, dtype=torch.bool)
    seen.scatter_(-1, index.long(), True)
    seen = seen.gather(2, group.long().unsqueeze(-1).expand(*group.shape, L))
    scores = scale * (query @ key.mT)
    chance = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = chance @ value
    d_chance = grad @ value.mT
    delta = (grad * out).sum(-1, keepdim=True)
    d_scores = chance * (d_chance - delta) * scale
    results = [out, d_scores @ key, d_scores.mT @ query, chance.mT @ grad]

    # Relative errors: of a number in its type, of a probability by its score's.
    step = torch.finfo(dtype).eps
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    sizes = scale * (query.norm(dim=-1, keepdim=True) * key.norm(dim=-1).amax())
    sizes = sizes.amax() if sizes.numel() else sizes.sum()
    # In half precision the probabilities of a product are rounded too.
    error = 2 * step + ROUNDING * wide * (1 + sizes)
    row = [x.norm(dim=-1).amax() for x in (query, key, value, grad)]
    column = chance.sum(-2).amax()
    tiny = torch.finfo(dtype).tiny
    slope = 4 * error * scale * row[3] * row[2]
    bounds = [error * row[2], slope * row[1], slope * row[0] * column]
    bounds.append(error * row[3] * column)
    return results, [bound + tiny * L for bound in bounds]


def check_attention(
    tokens: list[Tensor], group: Tensor, index: Tensor, scale: float
) -> None:
    """Run attention and its backward pass on finite numbers."""
    query, key, value = (x.detach().requires_grad_() for x in tokens[:3])
    out = group_attention(query, key, value, group, index, scale)
    actual = [out, *torch.autograd.grad(out, (query, key, value), tokens[3])]
    if not out.numel():
        return
    expected, bounds = attend_densely(tokens, group, index, scale)
    names = ('output', "query's gradient", "key's gradient", "value's gradient")
    for name, x, y, bound in zip(names, actual, expected, bounds, strict=True):
        assert x.dtype == tokens[0].dtype and x.shape == y.shape, name
        error = (x.detach().double() - y).abs().max()
        assert error <= bound, f'{name}: off by {error:.3g}, {bound:.3g} allowed'


def check_poison(
    case: Case, tokens: list[Tensor], group: Tensor, index: Tensor, scale: float
) -> None:
    """Keys and values that are not finite spoil those who see them alone."""
    query, key, value = tokens[:3]
    before = group_attention(query, key, value, group, index, scale)
    key, value = key.clone(), value.clone()
    sees = torch.zeros(group.shape, dtype=torch.bool)
    for row, kind in case.poisoned.items():
        key[:, :, row, 0] = value[:, :, row, -1] = POISON[kind]
        holds = (index == row).any(-1)  # (B, H, G)
        sees |= holds.gather(2, group.long())
    after = group_attention(query, key, value, group, index, scale)
    error = (after - before)[~sees].abs()
    bound = 8 * torch.finfo(case.dtype).eps * tokens[2].double().abs().max()
    assert not error.numel() or error.max() <= bound, 'a row that saw no such key'


def run_case(number: int) -> Case:
    """Make the call of a number; an AssertionError says what was wrong."""
    rng = torch.Generator().manual_seed(number)
    case = draw_case(rng)
    torch.set_num_threads(case.threads)
    tokens = draw_tokens(case, rng)
    _, H, _, D = case.shape
    centroids = F.normalize(torch.randn(H, case.num_groups, D, generator=rng), dim=-1)
    group, index = check_choices(case, tokens[0], tokens[1], centroids)
    scale = D**-0.5
    check_attention(tokens, group, index, scale)
    # Plain PyTorch multiplies what a query does not see by zero.
    if case.poisoned and served(case):
        check_poison(case, tokens, group, index, scale)
    return case


def served(case: Case) -> bool:
    """Whether kernels serve a call that has tokens at all."""
    x = torch.empty(case.shape, dtype=case.dtype)
    return x.numel() > 0 and not backend.why_not_fused(x, case.num_groups)


def main() -> None:
    """Call as often as asked; stop at the first call that goes wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--calls', type=int, default=1000)
    parser.add_argument('--first', type=int, default=0, help='number of the first call')
    parser.add_argument('--minutes', type=float, help='stop after as many')
    parser.add_argument('--out', type=output_file, help='JSON file of the counts')
    args = parser.parse_args()
    start = time.perf_counter()
    kinds: collections.Counter[str] = collections.Counter()
    for number in range(args.first, args.first + args.calls):
        try:
            case = run_case(number)
        except Exception as error:
            rng = torch.Generator().manual_seed(number)
            sys.exit(f'call {number}: {error!r}\n{draw_case(rng)}')
        kinds['by kernels'] += served(case)
        kinds[str(case.dtype).removeprefix('torch.')] += 1
        kinds['with poison'] += bool(case.poisoned)
        kinds['empty'] += not (case.shape[0] and case.shape[2])
        done = number - args.first + 1
        if done % 500 == 0:
            print(f'{done} calls, {time.perf_counter() - start:.0f} s', flush=True)
        if args.minutes and time.perf_counter() - start > 60 * args.minutes:
            break
    results = dict(calls=done, first=args.first, **kinds)
    print(', '.join(f'{name} {count}' for name, count in results.items()))
    if args.out:
        save(args.out, machine('cpu'), results=[results])


if __name__ == '__main__':
    run_command(main)
