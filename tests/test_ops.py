"""The operators against loops, on every back end that takes the inputs."""

import threading

import loops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmdgt import ops
from mmdgt.ops import backend as backend_module
from mmdgt.ops import reference

BACKENDS = ('auto', 'reference')
# B, H, L, D, G, K: masked and tiled attention, K beyond L, more groups than tokens.
SIZES = [
    (2, 2, 37, 8, 5, 12),
    (1, 2, 150, 16, 7, 9),
    (1, 1, 5, 8, 48, 98),
    (2, 1, 130, 8, 1, 1),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def draw(B, H, L, D, G, dtype=torch.float64):
    query, key, value = torch.randn(3, B, H, L, D, dtype=dtype)
    centroids = F.normalize(torch.randn(H, G, D), dim=-1)
    return query, key, value, centroids


def run(query, key, value, centroids, num_keys):
    """The three operators one after the other."""
    group = ops.assign_queries(query, centroids)
    index = ops.select_keys(key, centroids, num_keys, sorted=False)
    return ops.group_attention(query, key, value, group, index)


def to_numpy(*tensors):
    return [x.detach().double().numpy() for x in tensors]


@pytest.mark.parametrize(('B', 'H', 'L', 'D', 'G', 'K'), SIZES)
def test_equations_match_the_loops(backend, B, H, L, D, G, K):
    query, key, value, centroids = draw(B, H, L, D, G)
    group = ops.assign_queries(query, centroids)
    index = ops.select_keys(key, centroids, K)
    out = ops.group_attention(query, key, value, group, index, scale=0.3)

    q, k, v, e = to_numpy(query, key, value, centroids)
    assert group.dtype == index.dtype == torch.int32
    np.testing.assert_array_equal(group, loops.assign(q, e))
    np.testing.assert_array_equal(index, loops.select(k, e, K))
    expected = loops.attend(q, k, v, group.numpy(), index.numpy(), 0.3)
    np.testing.assert_allclose(out, expected, atol=1e-12)


@pytest.mark.parametrize(('B', 'H', 'L', 'D', 'G', 'K'), SIZES)
def test_sums_match_the_loops(backend, B, H, L, D, G, K):
    query, _, _, centroids = draw(B, H, L, D, G, dtype=torch.float32)
    group, sums, counts = ops.assign_and_sum(query, centroids)
    q, e = to_numpy(query, centroids)
    np.testing.assert_array_equal(group, loops.assign(q, e))
    means, expected_counts = loops.mean_queries(q, loops.assign(q, e), G)
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_allclose(
        sums, means * expected_counts[..., None], atol=1e-4, rtol=1e-5
    )


def test_default_scale_is_that_of_the_head_dim(backend):
    query, key, value, centroids = draw(1, 1, 20, 16, 3)
    group = ops.assign_queries(query, centroids)
    index = ops.select_keys(key, centroids, 4)
    torch.testing.assert_close(
        ops.group_attention(query, key, value, group, index),
        ops.group_attention(query, key, value, group, index, scale=0.25),
    )


def test_ties_go_to_the_lowest_group_and_token(backend):
    centroids = torch.eye(8)[[0, 0, 1]][None]  # groups 0 and 1 are the same
    query = torch.eye(8)[[0, 1, 2]][None, None]  # the last is tied between all
    assert ops.assign_queries(query, centroids).tolist() == [[[0, 2, 0]]]

    score = torch.tensor([1.0, 3.0, 0.0, 3.0, -0.0, 3.0, 1.0])
    key = score[:, None] * torch.eye(8)[0]
    index = ops.select_keys(key[None, None], centroids, 5)
    assert index[0, 0, 0].tolist() == [1, 3, 5, 0, 6]
    assert index[0, 0, 1].tolist() == [1, 3, 5, 0, 6]
    assert index[0, 0, 2].tolist() == [0, 1, 2, 3, 4]  # all zero, -0 equals 0


def test_unsorted_keys_are_the_same_keys(backend):
    _, key, _, centroids = draw(2, 2, 60, 8, 5)
    ordered = ops.select_keys(key, centroids, 13)
    unordered = ops.select_keys(key, centroids, 13, sorted=False)
    assert torch.equal(ordered.sort().values, unordered.sort().values)


@pytest.mark.parametrize('tokens', [30, 300])
def test_gradients(backend, tokens):
    query, key, value, centroids = draw(1, 2, tokens, 8, 4)
    group = ops.assign_queries(query, centroids)
    index = ops.select_keys(key, centroids, 6)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    # gradcheck perturbs every input entry: a few hundred tokens are enough.
    torch.autograd.gradcheck(
        lambda q, k, v: ops.group_attention(q, k, v, group, index),
        inputs,
        fast_mode=tokens > 100,
    )


def test_keys_nobody_chose_get_no_gradient(backend):
    query, key, value, _ = (x.requires_grad_() for x in draw(1, 1, 40, 8, 2))
    group = torch.zeros(1, 1, 40, dtype=torch.long)
    index = torch.tensor([[[[3, 5], [7, 9]]]])
    ops.group_attention(query, key, value, group, index).square().sum().backward()
    touched = key.grad.abs().sum(-1)[0, 0].nonzero().flatten().tolist()
    assert touched == [3, 5]


def test_everything_in_one_group_is_dense_attention(backend):
    query, key, value, _ = draw(1, 2, 90, 8, 1)
    group = torch.zeros(1, 2, 90, dtype=torch.int32)
    index = torch.arange(90).expand(1, 2, 1, 90)
    torch.testing.assert_close(
        ops.group_attention(query, key, value, group, index),
        F.scaled_dot_product_attention(query, key, value),
    )


def test_no_tokens(backend):
    query, key, value, centroids = draw(2, 1, 0, 8, 3)
    assert run(query, key, value, centroids, 4).shape == (2, 1, 0, 8)
    assert ops.assign_and_sum(query, centroids)[2].sum() == 0


def test_strided_views_of_a_projection(backend):
    qkv = torch.randn(2, 45, 3, 2, 8)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    centroids = F.normalize(torch.randn(2, 4, 8), dim=-1)
    dense = [x.contiguous() for x in (query, key, value)]
    torch.testing.assert_close(
        run(query, key, value, centroids, 7),
        run(*dense, centroids, 7),
    )


def test_large_values_in_half_precision_stay_finite(backend):
    query, key, value, centroids = draw(1, 2, 60, 32, 4)
    query, key = 1e3 * F.normalize(query, dim=-1), 1e3 * F.normalize(key, dim=-1)
    for dtype in (torch.float16, torch.bfloat16):
        inputs = [x.to(dtype) for x in (query, key, value)]
        out = run(*inputs, centroids, 9)
        assert out.dtype == dtype
        assert out.isfinite().all()


def test_nan_stays_in_its_image(backend):
    query, key, value, centroids = draw(2, 1, 50, 8, 4)
    expected = run(query, key, value, centroids, 6)
    query, key = query.clone(), key.clone()
    query[0, 0, 7], key[0, 0, 11] = torch.nan, torch.nan
    out = run(query, key, value, centroids, 6)
    assert out[0].isnan().any()
    torch.testing.assert_close(out[1], expected[1])


def test_autocast_does_not_reach_inside(backend):
    query, key, value, centroids = draw(1, 2, 60, 8, 4, dtype=torch.float32)
    expected = run(query, key, value, centroids, 9)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = run(query, key, value, centroids, 9)
    assert torch.equal(out, expected)


def test_memory_of_the_reference_grows_linearly():
    """No tensor of the tiled form outgrows a constant number of rows a token."""
    B, H, D, G, K = 1, 1, 8, 4, 5
    largest = {}
    for L in (1000, 2000, 4000):
        sizes = []

        class Watch(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None, log=sizes):
                result = func(*args, **(kwargs or {}))
                if isinstance(result, torch.Tensor):
                    log.append(result.numel())
                return result

        query, key, value, centroids = draw(B, H, L, D, G)
        group, index = (
            ops.assign_queries(query, centroids),
            ops.select_keys(key, centroids, K),
        )
        with Watch():
            reference.group_attention(query, key, value, group, index, 1.0)
        largest[L] = max(sizes)
    assert largest[4000] < 2.2 * largest[2000] < 2.2 * 2.2 * largest[1000]
    assert largest[4000] < 4000 * 4000 / 50


def test_operators_are_well_behaved():
    query, key, value, centroids = draw(1, 2, 30, 8, 4, dtype=torch.float32)
    group = ops.assign_queries(query, centroids)
    index = ops.select_keys(key, centroids, 5)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    namespace = torch.ops.mmdgt
    torch.library.opcheck(
        namespace.group_attention, (*inputs, group, index, 0.5), raise_exception=True
    )
    torch.library.opcheck(namespace.select_keys, (key.detach(), centroids, 5, True))
    torch.library.opcheck(namespace.assign_queries, (query.detach(), centroids, True))
    torch.library.opcheck(namespace.assign_queries, (query.detach(), centroids, False))


def test_flops_follow_equation_6():
    B, H, L, D, G, K = 2, 3, 100, 8, 5, 7
    query, key, value, centroids = draw(B, H, L, D, G, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        run(query, key, value, centroids, K)
    C = H * D  # torch counts two for each multiply-add
    assert counter.get_total_flops() == 2 * B * (2 * K * L * C + 2 * L * G * C)


def wrong_calls():
    query, key, value, centroids = draw(1, 2, 10, 8, 3, dtype=torch.float32)
    group = torch.zeros(1, 2, 10, dtype=torch.int32)
    index = torch.zeros(1, 2, 3, 4, dtype=torch.int32)
    attend = ops.group_attention
    return {
        'K': (ops.select_keys, (key, centroids, 0), ValueError, 'at least 1, got 0'),
        'K true': (ops.select_keys, (key, centroids, True), TypeError, 'got True'),
        'K 2.5': (ops.select_keys, (key, centroids, 2.5), TypeError, 'got 2.5'),
        'K none': (ops.select_keys, (key, centroids, None), TypeError, 'got None'),
        'NaN': (
            attend,
            (query, key, value, group, index, float('nan')),
            ValueError,
            'scale must be finite, got nan',
        ),
        'scale': (
            attend,
            (query, key, value, group, index, '1'),
            TypeError,
            "scale must be a number or None, got '1'",
        ),
        'no tensor': (ops.assign_queries, ([1.0], centroids), TypeError, 'got list'),
        'scalar': (ops.assign_queries, (query.sum(), centroids), ValueError, r'\(\)'),
        'vector': (
            attend,
            (query, key, value, group, index.flatten()),
            ValueError,
            r'index must have shape \(B, H, G, K\)',
        ),
        'no keys': (
            attend,
            (query, key, value, group, index[..., :0]),
            ValueError,
            'at least one token of a group, got K = 0',
        ),
        'dims': (
            ops.assign_queries,
            (query[0], centroids),
            ValueError,
            r'\(B, H, L, D',
        ),
        'heads': (ops.assign_queries, (query, centroids[:1]), ValueError, 'H = 2 and'),
        'integer': (
            ops.assign_queries,
            (group, centroids),
            ValueError,
            r'\(B, H, L, D',
        ),
        'long': (ops.select_keys, (key.long(), centroids, 2), TypeError, 'floating'),
        'shapes': (
            attend,
            (query, key[:, :, 1:], value, group, index),
            ValueError,
            'key',
        ),
        'dtypes': (
            attend,
            (query, key, value.half(), group, index),
            TypeError,
            'value',
        ),
        'group': (
            attend,
            (query, key, value, group[..., 1:], index),
            ValueError,
            'group',
        ),
        'floats': (
            attend,
            (query, key, value, group.float(), index),
            TypeError,
            'int32',
        ),
        'range': (
            attend,
            (query, key, value, group + 3, index),
            IndexError,
            r'\[0, 3\)',
        ),
        'token': (attend, (query, key, value, group, index - 1), IndexError, 'from -1'),
    }


@pytest.mark.parametrize('case', wrong_calls())
def test_errors_name_what_was_wrong(case):
    function, args, error, message = wrong_calls()[case]
    with pytest.raises(error, match=message):
        function(*args)


def test_a_second_derivative_is_refused_or_right():
    tokens = draw(1, 1, 12, 8, 3, dtype=torch.float64)[:3]
    query, key, value = (x.requires_grad_() for x in tokens)
    group = torch.arange(12).view(1, 1, 12) % 3
    index = torch.arange(12).view(1, 1, 3, 4)

    def attend(*tokens):
        return ops.group_attention(*tokens, group, index)

    (slope,) = torch.autograd.grad(
        attend(query, key, value).pow(2).sum(), query, create_graph=True
    )
    with pytest.raises(NotImplementedError, match='no second derivative'):
        slope.sum().backward()
    with ops.use_backend('reference'):
        assert torch.autograd.gradgradcheck(attend, (query, key, value))


def test_unknown_backend():
    with pytest.raises(ValueError, match="got 'gpu'"), ops.use_backend('gpu'):
        pass


def test_every_thread_chooses_its_back_end():
    """Two threads inside with blocks of their own, at the same time."""
    query = torch.randn(1, 1, 9, 8)
    both_inside = threading.Barrier(2)
    seen = {}

    def choose(name):
        with ops.use_backend(name):
            both_inside.wait(10)
            seen[name] = backend_module.function('assign_queries', query, 3)
            both_inside.wait(10)

    threads = [threading.Thread(target=choose, args=(n,)) for n in BACKENDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen['reference'] is reference.assign_queries
    assert seen['auto'] is not reference.assign_queries
    assert backend_module.function('assign_queries', query, 3) is seen['auto']


def test_plain_pytorch_is_told_once(monkeypatch):
    monkeypatch.setattr(backend_module, '_limits', {})
    monkeypatch.setattr(
        backend_module, '_problem', 'the extension mmdgt._ext is not built'
    )
    backend_module._warn_once.cache_clear()
    query, centroids = torch.randn(1, 1, 9, 8), torch.randn(1, 3, 8)
    with pytest.warns(UserWarning, match='5 to 41 times .*pip install') as told:
        ops.assign_queries(query, centroids)
        ops.assign_queries(query, centroids)
    assert len(told) == 1
    with (
        pytest.raises(RuntimeError, match='is not built; build it with'),
        ops.use_backend('fused'),
    ):
        ops.assign_queries(query, centroids)
