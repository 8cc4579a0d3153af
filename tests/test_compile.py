"""torch.compile captures the backbone as one graph."""

import pytest
import torch
from torch._dynamo.utils import counters

from mmdgt import DGT, DynamicGroupAttention

ARCH = dict(dims=(8, 16), depths=(1, 1), num_heads=(1, 2), stem_dims=8)
# All on one side of the size at which torch itself changes the way it convolves.
SIZES = [(128, 128), (160, 144), (192, 176)]


@pytest.fixture
def model():
    torch._dynamo.reset()
    counters.clear()
    return DGT(ARCH, num_groups=6, num_keys=10, out_indices=(0, 1))


@pytest.mark.parametrize('deploy', [False, True])
def test_three_sizes_need_two_graphs(model, deploy):
    """One for the first size, one for sizes that vary; no breaks."""
    model.eval()
    if deploy:
        model.switch_to_deploy()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        for size in SIZES:
            image = torch.randn(1, 3, *size)
            for ours, expected in zip(compiled(image), model(image), strict=True):
                torch.testing.assert_close(ours, expected)
    assert counters['stats']['unique_graphs'] <= 2


def test_training_leaves_the_same_gradients_and_sums(model):
    model.double().train()  # eager kernels and compiled code round differently
    image = torch.randn(2, 3, 64, 64, dtype=torch.double)
    layer = model.stages[0].blocks[0].attention

    def step(function):
        model.zero_grad()
        layer.group_counts.zero_()
        sum(out.square().sum() for out in function(image)).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        return [*grads, layer.group_sums.clone(), layer.group_counts.clone()]

    expected = step(model)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for ours, true in zip(step(compiled), expected, strict=True):
        torch.testing.assert_close(ours, true)


def test_code_of_inductor_computes_the_same():
    """What a user of torch.compile runs, forward and backward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = DynamicGroupAttention(16, 2, num_groups=4, num_keys=7, cosine=True)
    layer = layer.double().train()
    x = torch.randn(2, 30, 16, dtype=torch.double, requires_grad=True)

    def step(function):
        out = function(x)
        grads = torch.autograd.grad(out.pow(3).sum(), [x, *layer.parameters()])
        return [out, *grads, layer.group_sums.clone(), layer.group_counts.clone()]

    expected = step(layer)
    layer.group_sums.zero_()
    compiled = torch.compile(layer, fullgraph=True)
    for ours, true in zip(step(compiled), expected, strict=True):
        torch.testing.assert_close(ours, true)
