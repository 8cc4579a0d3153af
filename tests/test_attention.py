"""The attention layers, and how their centroids move."""

import re

import loops
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from torch import nn

from mmdgt.models import (
    DynamicGroupAttention,
    GlobalAttention,
    attention,
    update_centroids,
)

ARCH = dict(dims=(16,) * 4, depths=(1,) * 4, num_heads=(2,) * 4, stem_dims=8)


def to_numpy(x):
    return x.detach().double().numpy()


def split_heads(x, heads):
    """(B, L, C) -> (B, H, L, D)."""
    B, L, C = x.shape
    return x.reshape(B, L, heads, C // heads).transpose(0, 2, 1, 3)


def project(layer, x):
    """The layer's queries, keys and values (B, H, L, D), by NumPy."""
    weight, bias = to_numpy(layer.qkv.weight), to_numpy(layer.qkv.bias)
    parts = np.split(to_numpy(x) @ weight.T + bias, 3, axis=-1)
    return [split_heads(part, layer.num_heads) for part in parts]


def join(layer, out):
    """(B, H, L, D) -> (B, L, C), through the layer's last projection."""
    B, H, L, D = out.shape
    joined = out.transpose(0, 2, 1, 3).reshape(B, L, H * D)
    return joined @ to_numpy(layer.proj.weight).T + to_numpy(layer.proj.bias)


def cosine(layer, q, k):
    """Swin V2: unit vectors, scores times a learned factor of at most 100."""
    factor = np.minimum(np.exp(to_numpy(layer.logit_scale)), 100)[None]
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    return q * factor, k


@pytest.mark.parametrize('log_scale', [None, np.log(10), np.log(500)])
@pytest.mark.parametrize('num_keys', [5, 100])
def test_dynamic_group_attention(log_scale, num_keys):
    layer = DynamicGroupAttention(
        16, 2, num_groups=4, num_keys=num_keys, cosine=log_scale is not None
    ).eval()
    if log_scale is not None:
        nn.init.constant_(layer.logit_scale, log_scale)
    x = torch.randn(2, 21, 16)
    q, k, v = project(layer, x)
    scale = 8**-0.5
    if log_scale is not None:
        (q, k), scale = cosine(layer, q, k), 1.0
    e = to_numpy(layer.centroids)
    out = loops.attend(q, k, v, loops.assign(q, e), loops.select(k, e, num_keys), scale)
    np.testing.assert_allclose(to_numpy(layer(x)), join(layer, out), atol=2e-5)


@pytest.mark.parametrize('use_cosine', [False, True])
def test_global_attention(use_cosine):
    layer = GlobalAttention(16, 2, cosine=use_cosine)
    x = torch.randn(2, 11, 16)
    q, k, v = project(layer, x)
    scale = 8**-0.5
    if use_cosine:
        (q, k), scale = cosine(layer, q, k), 1.0
    everyone = np.broadcast_to(np.arange(11), (2, 2, 1, 11))
    out = loops.attend(q, k, v, np.zeros((2, 2, 11), dtype=int), everyone, scale)
    np.testing.assert_allclose(to_numpy(layer(x)), join(layer, out), atol=2e-5)


@pytest.mark.parametrize('keep', [0.25, 1e-5])
def test_centroids_move_by_equations_3_and_4(keep):
    layer = DynamicGroupAttention(16, 2, num_groups=30, num_keys=5).train()
    before = to_numpy(layer.centroids)
    x = torch.randn(2, 20, 16)
    layer(x)
    np.testing.assert_array_equal(to_numpy(layer.centroids), before)  # not yet

    reported = update_centroids(layer, keep)
    q, _, _ = project(layer, x)
    means, counts = loops.mean_queries(q, loops.assign(q, before), 30)
    expected = loops.move_centroids(before, means, counts, keep)
    assert (counts == 0).any(), 'the test wants empty groups'
    np.testing.assert_array_equal(reported[''], counts)
    np.testing.assert_allclose(to_numpy(layer.centroids), expected, atol=1e-6)
    empty = counts == 0
    np.testing.assert_array_equal(to_numpy(layer.centroids)[empty], before[empty])


def test_a_second_update_without_queries_changes_nothing():
    layer = DynamicGroupAttention(16, 2, num_groups=4).train()
    layer(torch.randn(1, 20, 16))
    update_centroids(layer, 0.1)
    once = layer.centroids.clone()
    update_centroids(layer, 0.1)
    assert torch.equal(layer.centroids, once)


def test_evaluation_changes_nothing():
    layer = DynamicGroupAttention(16, 2, num_groups=4).eval()
    before = layer.centroids.clone()
    layer(torch.randn(1, 20, 16))
    counts = update_centroids(layer, 0.1)['']
    assert torch.equal(layer.centroids, before)
    assert counts.sum() == 0


def test_queries_that_are_not_finite_move_no_centroid():
    layer = DynamicGroupAttention(16, 2, num_groups=4).train()
    x = torch.randn(2, 20, 16)
    x[0, 3, 2] = torch.nan
    layer(x)
    update_centroids(layer, 0.1)
    assert layer.centroids.isfinite().all()


def test_centroids_stay_in_float32_under_autocast():
    layer = DynamicGroupAttention(16, 2, num_groups=4).train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        layer(torch.randn(2, 20, 16)).float().sum().backward()
    assert layer.group_sums.dtype == layer.centroids.dtype == torch.float32
    update_centroids(layer, 0.1)
    torch.testing.assert_close(layer.centroids.norm(dim=-1), torch.ones(2, 4))


def sgd_steps(layer, number, after_step=lambda: None, passes=1):
    """Train a layer without a word of its centroids."""
    optimizer = torch.optim.SGD([p for p in layer.parameters()], lr=0.01)
    for _ in range(number):
        for _ in range(passes):
            layer(torch.randn(1, 20, 16)).square().sum().backward()
        optimizer.step()
        after_step()


@pytest.fixture
def untold():
    """As if no layer had warned before."""
    attention._warn_unmoved.cache_clear()


def test_a_loop_that_never_moves_the_centroids_is_told_once(untold):
    layers = [DynamicGroupAttention(16, 2, num_groups=4) for _ in range(2)]
    with pytest.warns(UserWarning, match=r'update_centroids.*CentroidHook') as told:
        for layer in layers:
            sgd_steps(layer, 30)
    assert len(told) == 1


@torch.inference_mode()
def test_a_model_that_is_made_for_inference():
    """torch counts no changes of such weights."""
    layer = DynamicGroupAttention(16, 2, num_groups=4).eval()
    assert layer(torch.randn(1, 20, 16)).shape == (1, 20, 16)


@pytest.mark.filterwarnings('error')
def test_loops_that_move_them_are_not_told(untold):
    layer = DynamicGroupAttention(16, 2, num_groups=4)
    sgd_steps(layer, 30, lambda: update_centroids(layer, 0.1))
    sgd_steps(layer, 30)  # moved on purpose no more
    accumulating = DynamicGroupAttention(16, 2, num_groups=4)
    sgd_steps(accumulating, 3, lambda: update_centroids(accumulating, 0.1), passes=30)
    frozen = DynamicGroupAttention(16, 2, num_groups=4).eval()
    sgd_steps(frozen, 30)
    for _ in range(50):
        DynamicGroupAttention(16, 2, num_groups=4)(torch.randn(1, 20, 16))


def test_a_compiled_loop_is_told_before_its_evaluation(untold):
    layer = DynamicGroupAttention(16, 2, num_groups=4).train()
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(30):
        layer.train()  # as an epoch begins; what was counted stays
        compiled(torch.randn(1, 20, 16)).square().sum().backward()
        optimizer.step()
    with pytest.warns(UserWarning, match='never move'):
        layer.eval()


def test_an_empty_group_splits_the_next_largest():
    """The r-th of a head the r-th largest, the lower of equal ones first, and round."""
    layer = DynamicGroupAttention(8, 2, num_groups=5, num_keys=3)
    counts = np.array([[0, 7, 0, 9, 0], [4, 0, 4, 0, 4]])
    before = to_numpy(layer.centroids)
    layer.group_counts.copy_(torch.from_numpy(counts))
    layer.group_sums.copy_(layer.centroids * layer.group_counts[..., None])
    update_centroids(layer, 0.5, reseed=True)
    expected = before.copy()  # the means are where the centroids were
    for h, splits in enumerate(({0: 3, 2: 1, 4: 3}, {1: 0, 3: 2})):
        for empty, largest in splits.items():
            expected[h, empty] = loops.unit(before[h, largest] + 0.1 * before[h, empty])
    np.testing.assert_allclose(to_numpy(layer.centroids), expected, atol=1e-6)


@pytest.fixture(scope='module')
def documented():
    """What the code of docs/attention.md defines."""
    text = (REPOSITORY / 'docs/attention.md').read_text()
    names = {'ARCH': ARCH}
    for block in re.findall(r'```python\n(.*?)```', text, re.DOTALL):
        if 'class' in block:
            exec(block.replace("DGT('tiny'", 'DGT(ARCH'), names)
    return names


def test_another_rule_of_choice_is_one_override(documented):
    layer = documented['Stripes'](16, 2)
    x = torch.randn(2, 100, 16)
    q, k, v = project(layer, x)
    group = np.broadcast_to(np.arange(100) // 64, (2, 2, 100))
    stripes = np.stack([np.arange(64), np.arange(36, 100)])
    index = np.broadcast_to(stripes, (2, 2, 2, 64))
    out = loops.attend(q, k, v, group, index, 8**-0.5)
    np.testing.assert_allclose(to_numpy(layer(x)), join(layer, out), atol=2e-5)
    mixers = [stage.blocks[0].attention for stage in documented['backbone'].stages]
    assert [type(m) for m in mixers] == 3 * [documented['Stripes']] + [GlobalAttention]


def test_centroids_that_are_trained(documented):
    layer = documented['TrainedCentroids'](16, 2, num_groups=4, num_keys=5)
    x = torch.randn(2, 20, 16)
    q, k, v = project(layer, x)
    e = to_numpy(layer.centroids)
    group, index = loops.assign(q, e), loops.select(k, e, 5)
    out = loops.attend(q, k, v, group, index, 8**-0.5)
    np.testing.assert_allclose(to_numpy(layer(x)), join(layer, out), atol=2e-5)
    unit = q / np.linalg.norm(q, axis=-1, keepdims=True)
    apart = [
        unit[b, h, i] - e[h, group[b, h, i]] for b, h, i in np.ndindex(group.shape)
    ]
    assert layer.distortion.item() == pytest.approx(np.square(apart).mean(), rel=1e-4)
    optimizer = torch.optim.SGD([layer.centroids], lr=1.0)
    layer.distortion.backward()
    optimizer.step()
    before, _ = layer.distortion.item(), layer(x)
    assert layer.distortion.item() < before


def test_what_another_rule_chooses_is_checked():
    class Wrong(DynamicGroupAttention):
        def choose(self, query, key):
            group, index = super().choose(query, key)
            return group + 3, index

    with pytest.raises(IndexError, match=r'group must lie in \[0, 3\)'):
        Wrong(16, 2, num_groups=3)(torch.randn(2, 12, 16))
