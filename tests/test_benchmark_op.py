"""The rivals of the operators compute what they are timed for."""

import loops
import numpy as np
import pytest
import torch

from mmdgt.ops import extension

L, H = 70, 2


@pytest.fixture
def benchmark(tools, monkeypatch):
    module = tools('benchmark_op')

    def flex():
        name = 'torch.nn.attention.flex_attention'
        return pytest.importorskip(name, reason='needs torch 2.5').flex_attention

    # Without the compiler, which is not what is tested here.
    monkeypatch.setattr(module, '_compiled_flex', flex)
    monkeypatch.setattr(module, '_compiled_eager', lambda: module.eager)
    return module


def expected(x):
    """Equations 1 and 2 in float64, by loops."""
    query, key, value = (t.double().numpy() for t in x[:3])
    centroids = x.centroids.double().numpy()
    group = loops.assign(query, centroids)
    index = loops.select(key, centroids, x.num_keys)
    return loops.attend(query, key, value, group, index, query.shape[-1] ** -0.5)


@pytest.mark.parametrize('draw', ['uniform', 'skewed', 'one'])
@pytest.mark.parametrize('rival', ['fused', 'eager', 'compiled', 'group_loop', 'flex'])
def test_a_rival_computes_group_attention(benchmark, rival, draw):
    if rival in ('fused', 'flex') and 'cpu' not in extension.devices():
        pytest.skip('needs the kernels')
    shape = benchmark.Shape(1, H, L, 9)
    x = benchmark.draw_inputs(shape, draw, torch.float32, 'cpu', seed=1)
    found = benchmark.RIVALS[rival](x)
    np.testing.assert_allclose(found.numpy(), expected(x), atol=1e-5)


def test_dense_attention_is_that_with_all_keys(benchmark):
    shape = benchmark.Shape(1, H, L, L)
    x = benchmark.draw_inputs(shape, 'uniform', torch.float32, 'cpu', seed=1)
    found = benchmark.RIVALS['dense'](x)
    np.testing.assert_allclose(found.numpy(), expected(x), atol=1e-5)


def test_stock_parts_compute_it_on_a_gpu(benchmark):
    if not torch.cuda.is_available():
        pytest.skip('needs a GPU')
    shape = benchmark.Shape(1, H, L, 9)
    x = benchmark.draw_inputs(shape, 'skewed', torch.float16, 'cuda', seed=1)
    found = benchmark.RIVALS['stock'](x).float().cpu()
    cpu = x._replace(**{n: getattr(x, n).cpu() for n in x._fields[:-1]})
    # A score that rounds to its neighbour's moves a query or a key to another group.
    error = np.abs(found.numpy() - expected(cpu)).max(-1)
    assert np.quantile(error, 0.9) < 1e-2


def test_the_draws_differ_in_their_groups(benchmark):
    shape = benchmark.Shape(1, H, 2000, 9)
    largest = {}
    for draw in ('uniform', 'skewed', 'one'):
        x = benchmark.draw_inputs(shape, draw, torch.float32, 'cpu', seed=1)
        group = (x.query @ x.centroids.mT).argmax(-1)
        largest[draw] = group.flatten().bincount().max() / group.numel()
    assert largest['uniform'] < 0.1 < largest['skewed'] < 0.9 < largest['one']


@pytest.mark.parametrize('which', ['backward', 'both'])
def test_a_backward_pass_is_that_of_the_rival(benchmark, which):
    shape = benchmark.Shape(1, H, L, 9)
    x = benchmark.draw_inputs(shape, 'uniform', torch.float32, 'cpu', seed=1)
    call = benchmark.make_call(benchmark.eager, x, which)
    leaves = [t.detach().clone().requires_grad_() for t in x[:3]]
    out = benchmark.group_loop(
        x._replace(query=leaves[0], key=leaves[1], value=leaves[2])
    )
    for found, other in zip(
        call(), torch.autograd.grad(out, leaves, x.grad), strict=True
    ):
        torch.testing.assert_close(found, other, atol=1e-5, rtol=1e-4)
