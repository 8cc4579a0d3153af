"""The CUDA kernels against a separately written float64 reference.

On a GPU or, under `make emulate`, on a CPU (docs/cuda.md).

All data of the exact tests are small integers: every score is then exact in any
arithmetic, so choices can be compared one by one, ties included.
"""

import os

import pytest
import torch

from mmdgt.ops import library

EMULATED = 'MMDGT_EMULATED' in os.environ  # see conftest.py
DEVICE = 'cpu' if EMULATED else 'cuda'
pytestmark = pytest.mark.skipif(
    not (EMULATED or torch.cuda.is_available())
    or not torch._C._dispatch_has_kernel_for_dispatch_key(
        'mmdgt::group_attention', DEVICE.upper()
    ),
    reason='needs a GPU and the extension with its CUDA part, or `make emulate`',
)
needs_gpu = pytest.mark.skipif(EMULATED, reason='needs a GPU')
ops = library.ops
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)


def rng(seed=0):
    return torch.Generator(DEVICE).manual_seed(seed)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, device=DEVICE, generator=rng(seed)).to(dtype)


def integers(*shape, low=-3, high=4, dtype=torch.float32, seed=0):
    x = torch.randint(low, high, shape, device=DEVICE, generator=rng(seed))
    return x.to(dtype)


def centroids_of(H, G, D, seed=1):
    return torch.nn.functional.normalize(randn(H, G, D, seed=seed), dim=-1)


def projection(B, H, L, D, dtype, seed=0):
    """Query, key and value as views of one (B, L, 3, H, D) tensor."""
    qkv = randn(B, L, 3, H, D, dtype=dtype, seed=seed)
    return qkv.permute(2, 0, 3, 1, 4)


def ranked(scores):
    """Tokens by descending score, the lower token first among equal ones."""
    return scores.sort(dim=-1, descending=True, stable=True).indices


def random_choice(B, H, L, G, K, draw='random', seed=3):
    group = torch.randint(0, G, (B, H, L), device=DEVICE, generator=rng(seed))
    if draw == 'skewed':
        group = (group * group) // G
    elif draw == 'one':
        group = torch.full_like(group, G // 2)
    order = torch.rand(B, H, G, L, device=DEVICE, generator=rng(seed + 1))
    return group.int(), order.argsort(-1)[..., :K].int().contiguous()


def attend(q, k, v, group, index, scale):
    """Eq. 2, group by group, in the data type of the inputs."""
    out, lse = torch.zeros_like(q), q.new_zeros(q.shape[:3])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for g in range(index.shape[2]):
                rows = (group[b, h] == g).nonzero().squeeze(-1)
                keys = index[b, h, g].long()
                score = (q[b, h, rows] @ k[b, h, keys].T) * scale
                out[b, h, rows] = score.softmax(-1) @ v[b, h, keys]
                lse[b, h, rows] = score.logsumexp(-1)
    return out, lse


def attend_with_grads(q, k, v, group, index, scale, grad, dtype):
    q, k, v = (x.detach().to(dtype).clone().requires_grad_() for x in (q, k, v))
    out, lse = attend(q, k, v, group, index, scale)
    grads = torch.autograd.grad(out, (q, k, v), grad.to(dtype))
    return [x.detach().double() for x in (out, *grads)], lse.detach().double()


def error(x, expected):
    return ((x.double() - expected).norm() / expected.norm().clamp_min(0.1)).item()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('D', [8, 32, 40, 64, 128])
@pytest.mark.parametrize('G', [1, 5, 48, 256])
def test_assignment_is_exact(dtype, D, G):
    B, H, L = 2, 3, 700
    query = integers(B, H, L, D, dtype=dtype)
    centroids = integers(H, G, D, seed=1)
    group, sums, counts = ops.assign_queries(query, centroids, True)
    scores = query.double() @ centroids.double().mT
    assert torch.equal(group.long(), scores.argmax(-1))
    member = torch.nn.functional.one_hot(group.long(), G).double()
    assert torch.equal(counts.long(), member.sum((0, 2)).long())
    unit = torch.nn.functional.normalize(query.double(), dim=-1)
    expected = torch.einsum('bhlg,bhld->hgd', member, unit)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype', DTYPES)
def test_assignment_has_float32_accuracy(dtype):
    query, _, _ = projection(2, 2, 3000, 32, dtype)
    centroids = centroids_of(2, 48, 32)
    group = ops.assign_queries(query, centroids, False)[0]
    scores = query.double() @ centroids.double().mT
    best = scores.max(-1).values
    chosen = scores.gather(-1, group.long().unsqueeze(-1)).squeeze(-1)
    # A near-tie within float32 rounding may fall either way.
    assert (best - chosen).max() < 1e-5
    assert (group != scores.argmax(-1)).float().mean() < 1e-3


def test_assignment_with_nan():
    query, centroids = integers(2, 2, 300, 32), integers(2, 20, 32, seed=1)
    query[0, 1, 7] = torch.nan
    clean = query.nan_to_num(0.0)
    group = ops.assign_queries(query, centroids, False)[0]
    expected = ops.assign_queries(clean, centroids, False)[0]
    assert 0 <= group[0, 1, 7] < 20
    group[0, 1, 7] = expected[0, 1, 7]
    assert torch.equal(group, expected)
    centroids[1, 13] = torch.nan
    group = ops.assign_queries(clean, centroids, False)[0]
    assert torch.equal(group[:, 0], expected[:, 0]) and (group[:, 1] == 13).all()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    'L, K',
    [
        (1, 1),
        (5, 3),
        (196, 98),
        (300, 300),
        (700, 1),
        (1500, 98),
        (1500, 1500),
        (3136, 98),
        (4000, 392),
        (5000, 3000),
        (20000, 392),
        (70000, 50),
    ],
)
@pytest.mark.parametrize('sort', [True, False])
def test_selection_is_exact(dtype, L, K, sort):
    B, H, G, D = 2, 2, 20, 32
    key = integers(B, H, L, D, dtype=dtype)
    centroids = integers(H, G, D, seed=1)
    index = ops.select_keys(key, centroids, K, sort).long()
    expected = ranked(centroids.double() @ key.double().mT)[..., :K]
    if not sort:
        index, expected = index.sort(-1).values, expected.sort(-1).values
    assert torch.equal(index, expected)


@pytest.fixture
def allow_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high')
    yield
    torch.set_float32_matmul_precision(before)


def test_sorted_scores_are_float32_whatever_torch_allows(allow_tf32):
    L, K = 20000, 9000  # so many that select_keys sorts all scores
    key = integers(1, 1, L, 32, low=-5000, high=5001)  # 13 bits, tf32 has 11
    centroids = integers(1, 5, 32, seed=1)
    index = ops.select_keys(key, centroids, K, True).long()
    expected = ranked(centroids.double() @ key.double().mT)[..., :K]
    assert torch.equal(index, expected)


@pytest.mark.parametrize('D', [8, 64, 128])
@pytest.mark.parametrize('G', [1, 256])
def test_selection_of_other_sizes(D, G):
    key, centroids = integers(1, 2, 3000, D), integers(2, G, D, seed=1)
    for dtype in DTYPES:
        index = ops.select_keys(key.to(dtype), centroids, 70, True).long()
        expected = ranked(centroids.double() @ key.double().mT)[..., :70]
        assert torch.equal(index, expected)


@pytest.mark.parametrize('L, K, G', [(2**18, 392, 48), (2**20, 392, 20)])
def test_selection_among_very_many(L, K, G):
    key = integers(1, 1, L, 32, low=-40, high=41)
    centroids = integers(1, G, 32, low=-40, high=41, seed=1)
    index = ops.select_keys(key, centroids, K, True).long()
    scores = (centroids.double() @ key.double().mT).float()
    assert torch.equal(index, ranked(scores)[..., :K])


@pytest.mark.parametrize('dtype', DTYPES)
def test_selection_of_equal_keys_takes_the_lowest_tokens(dtype):
    key = torch.ones(1, 2, 5000, 32, device=DEVICE, dtype=dtype)
    centroids = integers(2, 17, 32, seed=1)
    index = ops.select_keys(key, centroids, 98, True)
    assert torch.equal(index, torch.arange(98, device=DEVICE).expand_as(index).int())


@pytest.mark.parametrize('L, K', [(3136, 98), (20000, 392)])
@pytest.mark.parametrize('misled', ['few', 'many'])
def test_selection_when_the_sample_misleads(L, K, misled):
    samples = 512  # as make_plan and sampled_token of select_keys.cu have it
    i = torch.arange(samples, device=DEVICE)
    begin, end = i * L // samples, (i + 1) * L // samples
    sampled = begin + ((i * 2654435761 & 0xFFFFFFFF) * (end - begin) >> 32)
    key, centroids = integers(1, 2, L, 32), integers(2, 20, 32, seed=1)
    centroids[..., 0] = 1
    key[:, :, :, 0] = 0 if misled == 'few' else 1000
    key[:, :, sampled, 0] = 1000 if misled == 'few' else 0
    if misled == 'few':  # fewer than K keys are as good as the sample says
        key[:, :, sampled[: len(sampled) // 4 * 3], 0] = 0
        key[:, :, sampled[:60], 0] = 2000
    index = ops.select_keys(key, centroids, K, True).long()
    expected = ranked(centroids.double() @ key.double().mT)[..., :K]
    assert torch.equal(index, expected)


def test_selection_with_nan_and_infinity():
    key, centroids = integers(1, 2, 3136, 32), integers(2, 20, 32, seed=1)
    key[0, 1, [5, 3000]] = torch.nan
    centroids[0, 3] = 0
    key[0, 0, 77, 0] = torch.inf
    centroids[..., 0] = 1
    index = ops.select_keys(key, centroids, 98, True)
    assert (index[0, 1, :, :2] == torch.tensor([5, 3000], device=DEVICE)).all()
    assert (index[0, 0, :, 0] == 77).all()
    assert all(len(set(row.tolist())) == 98 for row in index[0].flatten(0, 1))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    'B, H, L, D, G, K, draw',
    [
        (2, 2, 1000, 32, 48, 98, 'random'),
        (2, 2, 1000, 32, 48, 98, 'skewed'),
        (1, 2, 3000, 32, 48, 98, 'one'),
        (1, 2, 2500, 32, 7, 392, 'random'),
        (3, 2, 196, 32, 48, 98, 'random'),
        (3, 2, 196, 32, 48, 98, 'one'),
        (1, 3, 49, 32, 48, 49, 'random'),
        (1, 1, 1, 32, 3, 1, 'random'),
        (1, 2, 250, 8, 5, 17, 'random'),
        (1, 2, 200, 40, 256, 33, 'random'),
        (1, 2, 700, 64, 6, 150, 'random'),
        (2, 1, 500, 128, 3, 100, 'skewed'),
        (1, 1, 600, 32, 1, 600, 'random'),
        (1, 1, 5000, 32, 2, 130, 'skewed'),
    ],
)
def test_attention(dtype, B, H, L, D, G, K, draw):
    q, k, v = projection(B, H, L, D, dtype)
    group, index = random_choice(B, H, L, G, K, draw)
    grad = randn(B, L, H, D, dtype=dtype, seed=9).transpose(1, 2)
    scale = D**-0.5
    expected, expected_lse = attend_with_grads(
        q, k, v, group, index, scale, grad, torch.float64
    )
    out, lse = ops.group_attention(q, k, v, group, index, scale)
    grads = ops.group_attention_backward(grad, q, k, v, group, index, out, lse, scale)
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    if dtype == torch.float32:
        limits = [1e-5] * 4
    else:
        # At most twice the error of the same sums in plain torch.
        plain, _ = attend_with_grads(q, k, v, group, index, scale, grad, dtype)
        limits = [2 * error(p, e) + 1e-4 for p, e in zip(plain, expected)]
    for name, ours, true, limit in zip(
        ('out', 'dq', 'dk', 'dv'), (out, *grads), expected, limits
    ):
        assert error(ours, true) <= limit, (name, error(ours, true), limit)


@pytest.mark.parametrize('scale', [-0.3, 0.0, 2.0])
@pytest.mark.parametrize('L', [150, 600])
def test_attention_of_any_scale(scale, L):
    q, k, v = projection(1, 2, L, 32, torch.float32)
    group, index = random_choice(1, 2, L, 9, 50)
    grad = randn(1, 2, L, 32, seed=9)
    expected, _ = attend_with_grads(q, k, v, group, index, scale, grad, torch.float64)
    out, lse = ops.group_attention(q, k, v, group, index, scale)
    grads = ops.group_attention_backward(grad, q, k, v, group, index, out, lse, scale)
    for ours, true in zip((out, *grads), expected):
        assert error(ours, true) < 2e-5


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size', [8.0, 30.0])
def test_attention_to_scores_far_above_those_of_the_first_keys(size, dtype):
    q, k, v = projection(1, 2, 300, 32, dtype)
    q, k = q * size, k * size
    group, index = random_choice(1, 2, 300, 7, 150)
    expected, expected_lse = attend_with_grads(
        q, k, v, group, index, 0.2, v, torch.float64
    )
    out, lse = ops.group_attention(q, k, v, group, index, 0.2)
    assert error(out, expected[0]) < 1e-2
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('L', [150, 600])
def test_large_inputs_stay_finite(dtype, L):
    q, k, v = (x * 1e3 for x in projection(1, 2, L, 32, dtype))
    group, index = random_choice(1, 2, L, 9, 50)
    out, lse = ops.group_attention(q, k, v, group, index, 32**-0.5)
    grads = ops.group_attention_backward(
        randn(1, 2, L, 32, dtype=dtype), q, k, v, group, index, out, lse, 32**-0.5
    )
    assert out.isfinite().all() and lse.isfinite().all()
    if dtype != torch.float16:  # whose range the gradients leave
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize('L', [150, 700])
def test_nan_stays_in_its_image(L):
    q, k, v = (x.clone() for x in projection(2, 2, L, 32, torch.bfloat16))
    q[0, 1, 3], k[0, 1, 5], v[0, 1, 9] = (torch.nan,) * 3
    centroids = centroids_of(2, 11, 32)
    group = ops.assign_queries(q, centroids, False)[0]
    index = ops.select_keys(k, centroids, 30, False)
    out, lse = ops.group_attention(q, k, v, group, index, 0.2)
    assert out[0, 1].isnan().any()
    assert out[1].isfinite().all() and out[0, 0].isfinite().all()
    grads = ops.group_attention_backward(
        torch.ones_like(out), q, k, v, group, index, out, lse, 0.2
    )
    for grad in grads:
        assert grad[1].isfinite().all() and grad[0, 0].isfinite().all()


@pytest.mark.parametrize('shape', [(0, 2, 10, 32), (2, 2, 0, 32), (2, 0, 10, 32)])
def test_nothing_to_do(shape):
    q = torch.zeros(shape, device=DEVICE)
    B, H, L, D = shape
    centroids = torch.zeros(H, 4, D, device=DEVICE)
    group, sums, counts = ops.assign_queries(q, centroids, True)
    assert sums.shape == (H, 4, D) and not sums.any() and not counts.any()
    index = ops.select_keys(q, centroids, 5, True)
    assert index.shape == (B, H, 4, min(5, L))
    out, lse = ops.group_attention(q, q, q, group, index, 1.0)
    grads = ops.group_attention_backward(q, q, q, q, group, index, out, lse, 1.0)
    assert all(x.shape == shape for x in (out, *grads))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('L', [196, 3136])
def test_results_repeat_bit_by_bit(monkeypatch, L, dtype):
    def run(seed):
        # A schedule of its own, as a GPU takes one anyway.
        monkeypatch.setenv('MMDGT_EMULATE_SHUFFLE', str(seed))
        q, k, v = projection(2, 2, L, 32, dtype)
        centroids = centroids_of(2, 48, 32)
        group, sums, _ = ops.assign_queries(q, centroids, True)
        index = ops.select_keys(k, centroids, 98, False)
        out, lse = ops.group_attention(q, k, v, group, index, 0.2)
        grads = ops.group_attention_backward(out, q, k, v, group, index, out, lse, 0.2)
        return group, sums, index, out, lse, *grads

    for first, second in zip(run(1), run(2)):
        assert torch.equal(first, second)


def test_gradients_of_an_image_do_not_depend_on_the_others():
    B, L, G, K, D = 3, 300, 256, 200, 64  # parts of which few images fit in the cache
    q, k, v = projection(B, 1, L, D, torch.float32)
    group, index = random_choice(B, 1, L, G, K)
    grad = randn(B, 1, L, D, seed=9)
    out, lse = ops.group_attention(q, k, v, group, index, 0.1)
    args = (grad, q, k, v, group, index, out, lse)
    together = ops.group_attention_backward(*args, 0.1)
    for b in range(B):
        alone = ops.group_attention_backward(*(x[b : b + 1] for x in args), 0.1)
        for x, y in zip(together, alone):
            assert torch.equal(x[b : b + 1], y)


@needs_gpu
@pytest.mark.parametrize('L', [196, 3136])
def test_runs_in_a_graph(L):
    q, k, v = projection(2, 2, L, 32, torch.bfloat16)
    centroids = centroids_of(2, 48, 32)

    def run():
        group, sums, _ = ops.assign_queries(q, centroids, True)
        index = ops.select_keys(k, centroids, 98, False)
        out, lse = ops.group_attention(q, k, v, group, index, 0.2)
        grads = ops.group_attention_backward(out, q, k, v, group, index, out, lse, 0.2)
        return sums, index, out, *grads

    expected = [x.clone() for x in run()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in captured:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for ours, true in zip(captured, expected):
        assert torch.equal(ours, true)


def test_unaligned_and_broadcast_inputs():
    storage = randn(2 * 2 * 300 * 32 + 3, dtype=torch.bfloat16)
    q = storage[3:].view(2, 2, 300, 32)
    k, v = randn(300, 32, dtype=torch.bfloat16).expand_as(q), q.flip(2)
    group, index = random_choice(2, 2, 300, 5, 40)
    expected, _ = attend(*(x.double() for x in (q, k, v)), group, index, 0.2)
    out, _ = ops.group_attention(q, k, v, group, index, 0.2)
    assert error(out, expected) < 5e-3


@needs_gpu
@pytest.mark.skipif(
    torch.cuda.is_available()
    and torch.cuda.get_device_properties(0).total_memory < 100 << 30,
    reason='needs 100 GB of device memory',
)
def test_more_than_two_to_the_31_elements():
    B, H, L, D, G, K = 34, 2, 2**20, 32, 8, 16
    assert B * H * L * D > 2**31
    q = torch.empty(B, H, L, D, device=DEVICE, dtype=torch.bfloat16)
    for b in range(B):
        q[b] = randn(H, L, D, dtype=torch.bfloat16, seed=b)
    centroids = centroids_of(H, G, D)
    group = ops.assign_queries(q, centroids, False)[0]
    index = ops.select_keys(q, centroids, K, False)
    out, lse = ops.group_attention(q, q, q, group, index, 0.2)
    grads = ops.group_attention_backward(q, q, q, q, group, index, out, lse, 0.2)
    alone = q[-1:]
    assert torch.equal(ops.assign_queries(alone, centroids, False)[0], group[-1:])
    assert torch.equal(ops.select_keys(alone, centroids, K, False), index[-1:])
    again, lse = ops.group_attention(alone, alone, alone, group[-1:], index[-1:], 0.2)
    assert torch.equal(again, out[-1:])
    for x, y in zip(
        ops.group_attention_backward(
            alone, alone, alone, alone, group[-1:], index[-1:], again, lse, 0.2
        ),
        grads,
    ):
        assert torch.equal(x, y[-1:])
