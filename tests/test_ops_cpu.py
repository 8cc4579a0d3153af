"""The compiled CPU operators against loops over images, heads, groups and tokens.

The loops below are written from the equations, in float64, and share nothing with
the package's own plain PyTorch operators.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmdgt.ops import library  # defines the operators  # noqa: F401

extension = pytest.importorskip('mmdgt._ext', reason='the extension is not built')
ops = torch.ops.mmdgt

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALF)
# B, H, L, D, G, K: odd lengths, one key, all keys, more groups than tokens, one
# group, head dims that fill no vector, several or eight.
SIZES = (
    (2, 2, 197, 32, 48, 49),
    (1, 2, 1531, 32, 48, 98),
    (2, 1, 61, 32, 5, 61),
    (1, 3, 77, 32, 256, 1),
    (2, 2, 1, 32, 48, 1),
    (1, 1, 130, 8, 1, 17),
    (1, 2, 85, 24, 7, 33),
    (1, 2, 101, 64, 48, 16),
    (1, 1, 53, 128, 11, 15),
    # All groups attended together.
    (2, 2, 196, 32, 48, 98),
    (1, 2, 85, 24, 7, 60),
    (1, 1, 101, 64, 48, 40),
    (1, 1, 50, 128, 11, 50),
)
LAYOUTS = ('contiguous', 'projection')


@pytest.fixture(autouse=True)
def one_thread():
    """The loops are many tiny operators; one test below varies the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_tokens(size, dtype, layout, seed=0, integers=False):
    """query, key, value (B, H, L, D); strided views of one projection if asked."""
    B, H, L, D = size[:4]
    generator = torch.Generator().manual_seed(seed)
    if integers:
        x = torch.randint(-3, 4, (B, L, 3, H, D), generator=generator).double()
    else:
        x = torch.randn(B, L, 3, H, D, generator=generator, dtype=torch.double)
    views = x.to(dtype).permute(2, 0, 3, 1, 4)
    return views if layout == 'projection' else views.contiguous()


def make_centroids(size, seed=0, integers=False):
    """(H, G, D), float32."""
    _, H, _, D, G, _ = size
    generator = torch.Generator().manual_seed(seed + 1000)
    if integers:
        return torch.randint(-2, 3, (H, G, D), generator=generator).float()
    return torch.nn.functional.normalize(
        torch.randn(H, G, D, generator=generator), dim=-1
    )


def make_choice(size, seed=0):
    """Any group (B, H, L) and index (B, H, G, K) of distinct tokens."""
    B, H, L, _, G, K = size
    generator = torch.Generator().manual_seed(seed + 2000)
    # Squaring leaves some groups large and some empty.
    group = (torch.rand(B, H, L, generator=generator) ** 2 * G).int()
    index = torch.rand(B, H, G, L, generator=generator).argsort(-1)[..., :K]
    return group, index.int().contiguous()


def scores_of(tokens: Tensor, centroids: Tensor) -> Tensor:
    """(B, H, L, G), float64."""
    return tokens.double() @ centroids.double().mT


def attend_in_loops(query, key, value, group, index, scale):
    """Eq. 2 for one image, head and group after the other, in the inputs' type."""
    B, H, _, _ = query.shape
    images = []
    for b in range(B):
        heads = []
        for h in range(H):
            out = torch.zeros_like(query[b, h])
            for j in range(index.shape[2]):
                mine = (group[b, h] == j).nonzero().flatten()
                keys = index[b, h, j].long()
                scores = query[b, h][mine] @ key[b, h][keys].T * scale
                out = out.index_add(0, mine, scores.softmax(-1) @ value[b, h][keys])
            heads.append(out)
        images.append(torch.stack(heads))
    return torch.stack(images)


def logsumexp_in_loops(query, key, group, index, scale):
    result = torch.empty(group.shape, dtype=torch.double)
    for b, h, query_token in torch.cartesian_prod(*map(torch.arange, group.shape)):
        keys = index[b, h, group[b, h, query_token]].long()
        scores = key[b, h][keys] @ query[b, h, query_token] * scale
        result[b, h, query_token] = scores.logsumexp(0)
    return result


def gradients_in_loops(grad_out, query, key, value, group, index, scale):
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    out = attend_in_loops(*leaves, group, index, scale)
    return torch.autograd.grad(out, leaves, grad_out)


def error_bound(theirs: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """Twice the error of plain torch code of the same type in half precision."""
    if dtype in HALF:
        floor = torch.finfo(dtype).eps / 2 * truth.abs().max()
        return 2 * max((theirs.double() - truth).abs().max(), floor)
    return 20 * torch.finfo(dtype).eps * max(1.0, truth.abs().max())


# --- Choices. With small integers every score is exact in every type and any order
# of summation, and ties abound: the choices must be equal.


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_exact_choices(dtype, layout, size):
    B, H, L, _, G, K = size
    query, key, _ = make_tokens(size, dtype, layout, integers=True)
    centroids = make_centroids(size, integers=True)
    group = ops.assign_queries(query, centroids, False)[0]
    index = ops.select_keys(key, centroids, K, True)
    unsorted = ops.select_keys(key, centroids, K, False)
    assert group.dtype == index.dtype == unsorted.dtype == torch.int32
    assert group.shape == (B, H, L) and index.shape == (B, H, G, K)

    query_scores = scores_of(query, centroids).tolist()
    key_scores = scores_of(key, centroids).mT.tolist()
    for b in range(B):
        for h in range(H):
            nearest = [row.index(max(row)) for row in query_scores[b][h]]
            assert group[b, h].tolist() == nearest
            for j in range(G):
                row = key_scores[b][h][j]
                best = sorted(range(L), key=lambda token: (-row[token], token))[:K]
                assert index[b, h, j].tolist() == best
                assert unsorted[b, h, j].tolist() == sorted(best)


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_choices_up_to_near_ties(dtype, size):
    """Scores closer than float32 rounding may be chosen either way, others not."""
    K = size[-1]
    query, key, _ = make_tokens(size, dtype, 'projection')
    centroids = make_centroids(size)
    scores = scores_of(query, centroids)
    near = 8 * torch.finfo(torch.float32).eps * query.double().norm(dim=-1).amax()
    group = ops.assign_queries(query, centroids, False)[0]
    chosen = scores.gather(-1, group.long().unsqueeze(-1)).squeeze(-1)
    assert (chosen >= scores.amax(-1) - near).all()

    scores = scores_of(key, centroids).mT
    near = 8 * torch.finfo(torch.float32).eps * key.double().norm(dim=-1).amax()
    index = ops.select_keys(key, centroids, K, True).long()
    chosen = scores.gather(-1, index)
    assert (chosen.diff() <= near).all()
    least = scores.topk(K).values[..., -1:]
    assert (chosen >= least - near).all()
    missed = torch.ones_like(scores).scatter(-1, index, 0)
    assert missed.sum(-1).eq(scores.shape[-1] - K).all(), 'a token was chosen twice'
    assert (scores * missed <= (least + near) * missed).all()


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_sums_and_counts(dtype):
    size = (2, 2, 2500, 32, 48, 1)  # several partial sums
    query = make_tokens(size, dtype, 'projection')[0]
    group, sums, counts = ops.assign_queries(query, make_centroids(size), True)
    unit = query.double() / query.double().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    assert sums.shape == (2, 48, 32) and counts.dtype == torch.int32
    for h in range(2):
        for j in range(48):
            mine = group[:, h] == j
            assert counts[h, j] == mine.sum()
            torch.testing.assert_close(
                sums[h, j].double(), unit[:, h][mine].sum(0), rtol=1e-5, atol=1e-4
            )
    for empty in ops.assign_queries(query, make_centroids(size), False)[1:]:
        assert empty.numel() == 0
    zeros = ops.assign_queries(torch.zeros_like(query), make_centroids(size), True)
    assert zeros[0].eq(0).all() and zeros[1].eq(0).all()


@pytest.mark.parametrize('order', ('rising', 'falling', 'constant', 'comb', 'signed 0'))
@pytest.mark.parametrize('sort', (True, False))
def test_selection_in_adverse_order(order, sort):
    """Orders of the keys that mislead a threshold estimated from a sample."""
    L, K, G, D = 9001, 70, 20, 32
    position = torch.arange(L)
    scores = {
        'rising': position,
        'falling': -position,
        'constant': torch.zeros(L),
        'comb': (position % 35 == 0) * 50.0,
        'signed 0': torch.zeros(L).copysign(position % 2 - 0.5),
    }[order].float()
    key = torch.zeros(1, 1, L, D)
    key[..., 0] = scores
    centroids = torch.zeros(1, G, D)
    centroids[..., 0] = 1
    expected = sorted(range(L), key=lambda token: (-scores[token].item(), token))[:K]
    index = ops.select_keys(key, centroids, K, sort)
    for row in index[0, 0]:
        assert row.tolist() == (expected if sort else sorted(expected))


# --- Attention


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_attention(dtype, layout, size):
    tokens = make_tokens(size, dtype, layout)
    choice = make_choice(size)
    scale = size[3] ** -0.5
    out, logsumexp = ops.group_attention(*tokens, *choice, scale)
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    truth = attend_in_loops(*tokens.double(), *choice, scale)
    plain = attend_in_loops(*tokens, *choice, scale)
    assert (out.double() - truth).abs().max() <= error_bound(plain, truth, dtype)
    if size[2] < 200:
        torch.testing.assert_close(
            logsumexp.double(),
            logsumexp_in_loops(*tokens[:2].double(), *choice, scale),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_gradients(dtype, layout, size):
    tokens = make_tokens(size, dtype, layout)
    choice = make_choice(size)
    scale = size[3] ** -0.5
    grad_out = make_tokens(size, dtype, layout, seed=1)[0]
    out, logsumexp = ops.group_attention(*tokens, *choice, scale)
    ours = ops.group_attention_backward(
        grad_out, *tokens, *choice, out, logsumexp, scale
    )
    truth = gradients_in_loops(grad_out.double(), *tokens.double(), *choice, scale)
    plain = gradients_in_loops(grad_out, *tokens, *choice, scale)
    for mine, right, theirs in zip(ours, truth, plain, strict=True):
        assert mine.dtype == dtype and mine.transpose(1, 2).is_contiguous()
        # With one key P = 1 and dS = 0; dP - delta leaves the rounding of `out`.
        slack = torch.finfo(dtype).eps * 8 if size[-1] == 1 else 0
        bound = error_bound(theirs, right, dtype) + slack
        assert (mine.double() - right).abs().max() <= bound


def test_gradcheck():
    size = (2, 2, 13, 8, 3, 5)
    tokens = make_tokens(size, torch.float64, 'contiguous')
    leaves = [x.clone().requires_grad_() for x in tokens]
    choice = make_choice(size)

    def attend(query, key, value):
        return ops.group_attention(query, key, value, *choice, 0.4)[0]

    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('scale', (0.2, -0.2, 0.0))
def test_everything_in_one_group(dtype, scale):
    size = (1, 2, 1300, 32, 48, 98)  # more than one task
    tokens = make_tokens(size, dtype, 'projection')
    _, index = make_choice(size)
    group = torch.full((1, 2, 1300), 47, dtype=torch.int32)
    out, logsumexp = ops.group_attention(*tokens, group, index, scale)
    truth = attend_in_loops(*tokens.double(), group, index, scale)
    plain = attend_in_loops(*tokens, group, index, scale)
    assert (out.double() - truth).abs().max() <= error_bound(plain, truth, dtype)
    grads = ops.group_attention_backward(
        tokens[0], *tokens, group, index, out, logsumexp, scale
    )
    truth = gradients_in_loops(
        tokens[0].double(), *tokens.double(), group, index, scale
    )
    plain = gradients_in_loops(tokens[0], *tokens, group, index, scale)
    for mine, right, theirs in zip(grads, truth, plain, strict=True):
        assert (mine.double() - right).abs().max() <= error_bound(theirs, right, dtype)


@pytest.mark.parametrize('size', ((1, 1, 40, 32, 3, 6), (1, 2, 50, 32, 48, 20)))
def test_a_repeated_key_counts_as_often(size):
    tokens = make_tokens(size, torch.float32, 'contiguous')
    group, index = make_choice(size)
    index[0, 0, 0, 1] = index[0, 0, 0, 0]  # of one slice alone
    out, logsumexp = ops.group_attention(*tokens, group, index, 0.3)
    truth = attend_in_loops(*tokens.double(), group, index, 0.3)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    grads = ops.group_attention_backward(
        tokens[0], *tokens, group, index, out, logsumexp, 0.3
    )
    truth = gradients_in_loops(tokens[0].double(), *tokens.double(), group, index, 0.3)
    for mine, right in zip(grads, truth, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_large_numbers(dtype):
    size = (1, 2, 300, 32, 12, 40)
    tokens = make_tokens(size, dtype, 'projection').clone()
    tokens[:2] *= 1e3
    choice = make_choice(size)
    out, logsumexp = ops.group_attention(*tokens, *choice, 32**-0.5)
    truth = attend_in_loops(*tokens.double(), *choice, 32**-0.5)
    # Scores of 1e6 leave float32 an absolute error of 0.1 in the exponent.
    wide = dtype == torch.float64
    close = (out.double() - truth).abs() < (1e-9 if wide else 0.2)
    assert close.double().mean() > 0.99 and out.isfinite().all()
    assert logsumexp.isfinite().all()
    grads = ops.group_attention_backward(
        tokens[2], *tokens, *choice, out, logsumexp, 32**-0.5
    )
    # float16 itself ends at 65504.
    assert dtype == torch.float16 or all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize(('L', 'K'), ((300, 20), (60, 40)))  # apart, together
@pytest.mark.parametrize('scale', (0.2, -0.2))
def test_scores_that_are_rounded_by_more_than_any_exponent(dtype, L, K, scale):
    size = (1, 2, L, 32, 4, K)
    tokens = make_tokens(size, dtype, 'projection').clone()
    tokens[:2] *= 1e5
    choice = make_choice(size)
    out, logsumexp = ops.group_attention(*tokens, *choice, scale)
    wide = tokens.double()
    close = (out.double() - attend_in_loops(*wide, *choice, scale)).abs() < 0.02
    assert close.double().mean() > 0.99
    truth = logsumexp_in_loops(*wide[:2], *choice, scale)
    torch.testing.assert_close(logsumexp.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('bad', (math.nan, math.inf))
def test_nan_stays_in_its_slice(dtype, bad):
    size = (2, 2, 700, 32, 16, 60)
    _, _, L, _, G, K = size
    tokens = make_tokens(size, dtype, 'projection')
    centroids = make_centroids(size)

    def run(tokens):
        query, key, value = tokens
        group = ops.assign_queries(query, centroids, True)[0]
        index = ops.select_keys(key, centroids, K, True)
        out, logsumexp = ops.group_attention(query, key, value, group, index, 0.2)
        grads = ops.group_attention_backward(
            value, query, key, value, group, index, out, logsumexp, 0.2
        )
        return group, index, out, *grads

    clean = run(tokens)
    for which in range(3):
        for whole in (False, True):
            spoilt = tokens.clone()
            where = spoilt[which, 1, 0]
            (where if whole else where[17])[:] = bad
            results = run(spoilt)
            assert results[0].min() >= 0 and results[0].max() < G
            assert results[1].min() >= 0 and results[1].max() < L
            for before, after in zip(clean, results, strict=True):
                assert torch.equal(before[0], after[0])
                assert torch.equal(before[1, 1], after[1, 1])
            if math.isnan(bad) and whole:
                assert results[2][1, 0].isnan().all()
            if math.isnan(bad) and which == 0:
                assert results[2][1, 0, 17].isnan().all()


# Sizes of which the first has its groups attended together, the second one by one.
BOTH_WAYS = ((1, 2, 60, 32, 48, 25), (1, 2, 150, 32, 4, 9))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('size', BOTH_WAYS)
def test_a_key_that_no_group_selected_is_not_seen(dtype, size):
    """Not even where it is infinite, NaN, or scores far above all others."""
    tokens = make_tokens(size, dtype, 'projection')
    grad_out = make_tokens(size, dtype, 'contiguous', seed=1)[0]
    group, index = make_choice((1, 2, size[2] - 1, *size[3:]))
    group = torch.nn.functional.pad(group, (0, 1))
    index += (index >= 7).int()

    def run(tokens):
        out, logsumexp = ops.group_attention(*tokens, group, index, 0.2)
        return out, *ops.group_attention_backward(
            grad_out, *tokens, group, index, out, logsumexp, 0.2
        )

    expected = run(tokens)
    assert all(x[:, :, 7].eq(0).all() for x in expected[2:])
    for which, value in ((1, 3e4), (1, math.inf), (1, math.nan), (2, math.inf)):
        spoilt = tokens.clone()
        spoilt[which, :, :, 7] = value
        eps = torch.finfo(dtype).eps
        for before, after in zip(expected, run(spoilt), strict=True):
            torch.testing.assert_close(after, before, rtol=40 * eps, atol=40 * eps)


@pytest.mark.parametrize('size', BOTH_WAYS)
@pytest.mark.parametrize('which', range(4))
def test_infinities_spoil_only_what_they_reach(which, size):
    tokens = make_tokens(size, torch.float32, 'contiguous')
    rows = [*tokens.clone(), make_tokens(size, torch.float32, 'contiguous', 1)[0]]
    rows[which][0, 0, 11, 3] = math.inf
    *tokens, grad_out = rows
    choice = make_choice(size)
    out, logsumexp = ops.group_attention(*tokens, *choice, 0.2)
    ours = ops.group_attention_backward(grad_out, *tokens, *choice, out, logsumexp, 0.2)
    wide = [x.double() for x in tokens]
    truth = gradients_in_loops(grad_out.double(), *wide, *choice, 0.2)
    assert torch.equal(
        out.isfinite().all(-1), attend_in_loops(*wide, *choice, 0.2).isfinite().all(-1)
    )
    for mine, right in zip(ours, truth, strict=True):
        assert torch.equal(mine.isfinite().all(-1), right.isfinite().all(-1))


def test_nan_scores_come_first():
    key = torch.randn(1, 1, 50, 32)
    key[0, 0, [7, 30]] = math.nan
    centroids = torch.randn(1, 4, 32)
    index = ops.select_keys(key, centroids, 5, True)
    assert index[0, 0, :, :2].tolist() == [[7, 30]] * 4
    group = ops.assign_queries(key, centroids, False)[0]
    assert group[0, 0, 7] == 0


def test_the_same_on_every_run_and_number_of_threads():
    size = (1, 1, 3000, 32, 48, 98)
    tokens = make_tokens(size, torch.float32, 'projection')
    centroids = make_centroids(size)

    def run(threads):
        torch.set_num_threads(threads)
        group, sums, counts = ops.assign_queries(tokens[0], centroids, True)
        index = ops.select_keys(tokens[1], centroids, 98, False)
        out, logsumexp = ops.group_attention(*tokens, group, index, 0.2)
        grads = ops.group_attention_backward(
            tokens[2], *tokens, group, index, out, logsumexp, 0.2
        )
        return group, sums, counts, index, out, logsumexp, *grads

    first = run(1)
    for threads in (1, 2, 3, 5):
        for before, after in zip(first, run(threads), strict=True):
            assert torch.equal(before, after)


@pytest.mark.parametrize('shape', ((0, 2, 9, 32), (2, 2, 0, 32), (2, 0, 9, 32)))
def test_nothing_to_do(shape):
    query = torch.zeros(shape)
    centroids = torch.zeros(shape[1], 6, 32)
    group, sums, counts = ops.assign_queries(query, centroids, True)
    assert group.shape == shape[:3] and sums.eq(0).all() and counts.eq(0).all()
    assert sums.shape == (shape[1], 6, 32) and counts.shape == (shape[1], 6)
    index = ops.select_keys(query, centroids, 4, True)
    assert index.shape == (*shape[:2], 6, min(4, shape[2]))
    out, logsumexp = ops.group_attention(query, query, query, group, index, 1.0)
    assert out.shape == shape and logsumexp.shape == shape[:3]
    grads = ops.group_attention_backward(
        out, query, query, query, group, index, out, logsumexp, 1.0
    )
    assert all(grad.shape == shape for grad in grads)


def test_clear_errors():
    size = (1, 2, 20, 32, 4, 5)
    q, k, v = make_tokens(size, torch.float32, 'contiguous')
    e = make_centroids(size)
    group, index = make_choice(size)
    outside = group.clone()
    outside[0, 1, 3] = 4
    negative = index.clone()
    negative[0, 0, 0, 0] = -1
    cases = (
        ('(B, H, L, D)', ops.assign_queries, (q[0], e, False)),
        ('float32 float64 float16 bfloat16', ops.assign_queries, (q.int(), e, False)),
        ('multiple of 8', ops.assign_queries, (q[..., :20], e[..., :20], False)),
        ('stride 1', ops.assign_queries, (q.mT.contiguous().mT, e, False)),
        ('(H, G, D)', ops.assign_queries, (q, e[:1], False)),
        ('contiguous float32', ops.select_keys, (k, e.double(), 5, True)),
        ('at least 1', ops.select_keys, (k, e, 0, True)),
        ('1 to 256', ops.select_keys, (k, torch.zeros(2, 257, 32), 5, True)),
        ('equal', ops.group_attention, (q, k[:, :, :9], v, group, index, 1.0)),
        ('one type', ops.group_attention, (q, k, v.half(), group, index, 1.0)),
        ('int32', ops.group_attention, (q, k, v, group.long(), index, 1.0)),
        ('(B, H, L)', ops.group_attention, (q, k, v, group[:, :1], index, 1.0)),
        ('(B, H, G, K)', ops.group_attention, (q, k, v, group, index[0], 1.0)),
        ('groups 0 to 3', ops.group_attention, (q, k, v, outside, index, 1.0)),
        ('tokens 0 to 19', ops.group_attention, (q, k, v, group, negative, 1.0)),
    )
    for message, op, arguments in cases:
        with pytest.raises((RuntimeError, IndexError)) as caught:
            op(*arguments)
        assert message in str(caught.value)


def test_limits_are_what_the_operators_refuse():
    """What Python is told the kernels serve, tried at the edge and beyond it."""
    limits = extension.limits
    most, step = limits['max_head_dim'], limits['head_dim_step']

    def served(D=step, G=1, dtype=torch.float32):
        try:
            ops.assign_queries(
                torch.ones(1, 1, 3, D, dtype=dtype), torch.ones(1, G, D), False
            )
        except RuntimeError:
            return False
        return True

    dims = [D for D in range(1, most + 2 * step) if served(D)]
    assert dims == list(range(step, most + 1, step))
    assert served(G=limits['max_groups']) and not served(G=limits['max_groups'] + 1)
    floating = ('float8_e4m3fn', 'bfloat16', 'float16', 'float32', 'float64', 'int32')
    tried = {name for name in floating if served(dtype=getattr(torch, name))}
    assert tried == set(limits['dtypes']['cpu'])
    assert set(limits['dtypes']['cuda']) <= tried


def test_inputs_farther_apart_than_two_to_the_31_elements():
    """Of the storage hardly a page is touched."""
    size = (2, 1, 61, 32, 5, 7)
    near = make_tokens(size, torch.bfloat16, 'contiguous')
    step = 2**25
    storage = torch.empty(2 * 62 * step, dtype=torch.bfloat16)
    q, k, v = far = [
        storage[32 * i :].as_strided(size[:4], (62 * step, step, step, 1))
        for i in range(3)
    ]
    for x, there in zip(near, far, strict=True):
        there.copy_(x)
    centroids = make_centroids(size)
    for here, there in zip(
        ops.assign_queries(near[0], centroids, True),
        ops.assign_queries(q, centroids, True),
        strict=True,
    ):
        assert torch.equal(here, there)
    index = ops.select_keys(near[1], centroids, 7, True)
    assert torch.equal(index, ops.select_keys(k, centroids, 7, True))
    group, _ = make_choice(size)
    outputs = ops.group_attention(*near, group, index, 0.2)
    for here, there in zip(
        outputs, ops.group_attention(q, k, v, group, index, 0.2), strict=True
    ):
        assert torch.equal(here, there)
    for here, there in zip(
        ops.group_attention_backward(near[0], *near, group, index, *outputs, 0.2),
        ops.group_attention_backward(q, q, k, v, group, index, *outputs, 0.2),
        strict=True,
    ):
        assert torch.equal(here, there)


@pytest.mark.skipif(
    os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') < 8 << 30
    or 'MMDGT_TEST_ISA' in os.environ,
    reason='needs 8 GB of memory, once',
)
def test_more_than_two_to_the_31_elements():
    B, H, L, D, G, K = 34, 2, 2**20, 32, 1, 3
    assert B * H * L * D > 2**31
    image = torch.randn(1, H, L, D, dtype=torch.bfloat16)
    images = image.expand(B, -1, -1, -1)
    centroids = make_centroids((1, H, L, D, G, K))
    group = ops.assign_queries(images, centroids, False)[0]
    index = ops.select_keys(images, centroids, K, False)
    outputs = ops.group_attention(images, images, images, group, index, 0.2)
    own = ops.select_keys(image, centroids, K, False)
    expected = ops.group_attention(image, image, image, group[:1], own, 0.2)
    assert torch.equal(index[-1:], own)
    for whole, alone in zip(outputs, expected, strict=True):
        assert torch.equal(whole[:1], alone) and torch.equal(whole[-1:], alone)


@pytest.mark.skipif('MMDGT_TEST_ISA' in os.environ, reason='this is that run')
@pytest.mark.parametrize('isa', ('default', 'avx2', 'avx512'))
def test_every_instruction_set(isa, tmp_path):
    """The tests above and of GELU's norm, with the kernels for lesser machines."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    order = ('default', 'avx2', 'avx512')
    if best not in order or order.index(isa) >= order.index(best):
        pytest.skip(f'{isa} kernels are tested directly or not at all on {best}')
    environment = {
        **os.environ,
        'ATEN_CPU_CAPABILITY': isa,
        'MMDGT_TEST_ISA': isa,
        'PYTHONPATH': os.pathsep.join(sys.path),  # the package that is tested here
    }
    files = __file__, str(Path(__file__).with_name('test_gelu_batch_norm.py'))
    command = [sys.executable, '-m', 'pytest', '-q', '-x', *files]
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:]
