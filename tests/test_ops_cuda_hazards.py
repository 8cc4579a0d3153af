"""Inputs that the CUDA kernels once got wrong: each test stands for one of them."""

import pytest
import torch
from test_ops_cuda import (
    DEVICE,
    DTYPES,
    EMULATED,
    attend_with_grads,
    error,
    integers,
    ops,
    projection,
    pytestmark,  # noqa: F401
    randn,
    random_choice,
    ranked,
)

SMALLEST_GPU = 99 << 10  # shared memory of a block of sm_86, sm_89 and sm_120


def attend_both_ways(q, k, v, group, index, grad, scale=0.2):
    out, lse = ops.group_attention(q, k, v, group, index, scale)
    grads = ops.group_attention_backward(grad, q, k, v, group, index, out, lse, scale)
    return out, *grads


def test_a_row_that_names_a_token_many_times():
    L, G, K = 1000, 48, 98
    q, k, v = projection(1, 1, L, 32, torch.bfloat16)
    group, index = random_choice(1, 1, L, G, K)
    index[:, :, 3:] = 0  # 45 * 98 parts of one token, more than are ever listed
    grad = randn(1, 1, L, 32, dtype=torch.bfloat16)
    ours = attend_both_ways(q, k, v, group, index, grad)
    true, _ = attend_with_grads(q, k, v, group, index, 0.2, grad, torch.float64)
    for x, y in zip(ours, true):
        assert x.isfinite().all()
        assert error(x[:, :, 1:], y[:, :, 1:]) < 1e-2


@pytest.mark.parametrize('L', [196, 300])
@pytest.mark.parametrize('what', ['key', 'value', 'both'])
@pytest.mark.parametrize('bad', [torch.nan, torch.inf, -torch.inf])
def test_a_key_that_nobody_selected_has_no_say(L, what, bad):
    q, k, v = (x.clone() for x in projection(1, 2, L, 32, torch.bfloat16))
    group, index = random_choice(1, 2, L, 7, 20)
    index[index == 5] = 6
    grad = randn(1, 2, L, 32, dtype=torch.bfloat16)
    expected = attend_both_ways(q, k, v, group, index, grad)
    if what != 'value':
        k[:, :, 5, 3] = bad
    if what != 'key':
        v[:, :, 5] = bad
    for x, y in zip(attend_both_ways(q, k, v, group, index, grad), expected):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('L', [196, 300])
@pytest.mark.parametrize('what', ['query', 'grad'])
def test_a_query_changes_nothing_for_keys_that_it_does_not_see(L, what):
    q, k, v = (x.clone() for x in projection(1, 1, L, 32, torch.bfloat16))
    group, index = random_choice(1, 1, L, 4, 20)
    index[:, :, 0] = torch.arange(20, device=DEVICE)  # the only group to see these
    for g in range(1, 4):  # no token twice
        index[:, :, g] = torch.arange(20, device=DEVICE) * (g + 2) + 20
    grad = randn(1, 1, L, 32, dtype=torch.bfloat16)
    expected = attend_both_ways(q, k, v, group, index, grad)
    token = (group[0, 0] == 0).nonzero()[0, 0]
    (q if what == 'query' else grad)[:, :, token, 3] = torch.inf
    ours = attend_both_ways(q, k, v, group, index, grad)
    for x, y in zip(ours[2:], expected[2:]):
        torch.testing.assert_close(x[:, :, 20:], y[:, :, 20:], rtol=2e-2, atol=2e-2)
        assert not x[:, :, :20].isfinite().all()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('L, sort', [(700, True), (700, False), (200, False)])
@pytest.mark.parametrize('sign', [1, -1])
def test_infinities_keep_their_order(dtype, L, sort, sign):
    G, K = 20, 30
    x = integers(1, 2, L, 32, dtype=dtype)
    # Not zero, and in half precision a sum of two numbers of either sign.
    small = (2 * integers(2, G, 32, seed=2) + 1) / 2**12
    centroids = integers(2, G, 32, seed=1) + small
    x[0, 0, [7, 130, L - 1], 3] = sign * torch.inf
    scores = centroids.double() @ x.double().mT
    assert not scores.isnan().any() and scores.isposinf().any()
    index, expected = ops.select_keys(x, centroids, K, sort), ranked(scores)[..., :K]
    if not sort:
        index, expected = index.sort(-1).values, expected.sort(-1).values
    assert torch.equal(index.long(), expected)
    group = ops.assign_queries(x, centroids, False)[0]
    assert torch.equal(group.long(), scores.argmax(2))


def test_strides_beyond_31_bits():
    L, stride = 200, 2**24
    assert L * stride > 2**31
    storage = torch.empty(L * stride, device=DEVICE, dtype=torch.bfloat16)
    far = storage.as_strided((1, 1, L, 32), (0, 0, stride, 1))
    near = randn(1, 1, L, 32, dtype=torch.bfloat16)
    far.copy_(near)
    group, index = random_choice(1, 1, L, 5, 20)
    ours = attend_both_ways(far, far, far, group, index, far)
    for x, y in zip(ours, attend_both_ways(near, near, near, group, index, near)):
        assert torch.equal(x, y)


def test_float16_gradients_that_overflow_on_the_way_to_a_small_sum():
    L = 300
    q, k, v = projection(1, 1, L, 32, torch.float16)
    group = (torch.arange(L, device=DEVICE) % 2).int().view(1, 1, L)
    index = torch.full((1, 1, 2, 1), 5, device=DEVICE, dtype=torch.int32)
    grad = (1000 - 2000 * group).to(torch.float16).unsqueeze(-1).expand_as(q)
    d_value = attend_both_ways(q, k, v, group, index, grad)[3]
    assert not d_value.any()  # 150 times 1000 and 150 times -1000


@pytest.mark.parametrize('L', [196, 300])
def test_a_group_out_of_range_counts_as_the_nearest(L):
    q, k, v = projection(1, 2, L, 32, torch.bfloat16)
    group, index = random_choice(1, 2, L, 6, 20)
    grad = randn(1, 2, L, 32, dtype=torch.bfloat16)
    group[0, 0, 3], group[0, 1, 7] = -5, 6
    ours = attend_both_ways(q, k, v, group, index, grad)
    expected = attend_both_ways(q, k, v, group.clamp(0, 5), index, grad)
    for x, y in zip(ours, expected):
        assert torch.equal(x, y)


@pytest.mark.skipif(not EMULATED, reason='a GPU has the shared memory that it has')
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('D, G', [(64, 256), (128, 40)])
def test_every_size_is_served_with_little_shared_memory(monkeypatch, dtype, D, G):
    monkeypatch.setenv('MMDGT_EMULATE_SHARED_BYTES', str(SMALLEST_GPU))
    L, K = 257, 20
    x, centroids = integers(1, 1, L, D, dtype=dtype), integers(1, G, D, seed=1)
    scores = centroids.double() @ x.double().mT
    group = ops.assign_queries(x, centroids, False)[0]
    assert torch.equal(group.long(), scores.argmax(2))
    index = ops.select_keys(x, centroids, K, True)
    assert torch.equal(index.long(), ranked(scores)[..., :K])
    q, k, v = projection(1, 1, L, D, dtype)
    grad = randn(1, 1, L, D, dtype=dtype)
    ours = attend_both_ways(q, k, v, group, index, grad, D**-0.5)
    true, _ = attend_with_grads(q, k, v, group, index, D**-0.5, grad, torch.float64)
    for out, expected in zip(ours, true):
        assert error(out, expected) < (1e-5 if dtype == torch.float32 else 2e-2)
