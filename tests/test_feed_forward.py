"""The feed-forward network against plain layers, as CMT's authors wrote it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdgt.models.convolutions import ResidualDepthwiseConv
from mmdgt.models.feed_forward import IRFFN
from mmdgt.ops import use_backend

# Of two images; of one, with more pixels than channels; of one pixel.
SHAPES = ((2, 16, 5, 7), (1, 16, 12, 11), (3, 16, 1, 1))


def make_layer(momentum=0.1):
    torch.manual_seed(0)
    layer = IRFFN(16, 4, lambda dims: nn.BatchNorm2d(dims, momentum=momentum))
    for norm in (layer.norm1, layer.norm2, layer.norm3):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -1, 1)
    return layer.double()


def composition(layer, x):
    """The same from the layer's weights; norms are torch's own."""
    x = F.conv2d(x, layer.expand.weight, layer.expand.bias)
    x = layer.norm1(F.gelu(x))
    inner = layer.depthwise
    x = F.conv2d(x, inner.weight, inner.bias, padding=1, groups=x.shape[1]) + x
    x = layer.norm2(F.gelu(x))
    return layer.norm3(F.conv2d(x, layer.reduce.weight, layer.reduce.bias))


def train(layer, forward, x):
    """Output, gradients and running statistics of a training step."""
    x = x.detach().clone().requires_grad_()
    out = forward(layer.train(), x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), x.grad, *(p.grad for p in layer.parameters())


def assert_all_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('backend', ('auto', 'reference'))
@pytest.mark.parametrize('momentum', (0.1, None))
@pytest.mark.parametrize(
    'memory_format', (torch.channels_last, torch.contiguous_format)
)
@pytest.mark.parametrize('shape', SHAPES)
def test_trained(shape, memory_format, momentum, backend):
    layer = make_layer(momentum)
    other = copy.deepcopy(layer)
    x = torch.randn(shape, dtype=torch.double).contiguous(memory_format=memory_format)
    expected = train(other, composition, x)
    with use_backend(backend):
        actual = train(layer, IRFFN.forward, x)
    assert_all_close(actual, expected)
    assert_all_close(layer.buffers(), other.buffers())


@pytest.mark.parametrize('backend', ('auto', 'reference'))
@pytest.mark.parametrize('shape', SHAPES)
@torch.no_grad()
def test_evaluated_and_deployed(shape, backend):
    layer = make_layer()
    for norm in (layer.norm1, layer.norm2, layer.norm3):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    x = torch.randn(shape, dtype=torch.double)
    expected = composition(layer.eval(), x)
    with use_backend(backend):
        assert_all_close([layer(x)], [expected])
        layer.switch_to_deploy()
        assert_all_close([layer(x)], [expected])


@pytest.mark.parametrize('backend', ('auto', 'reference'))
def test_checkpointed(backend):
    layer = make_layer()
    x = torch.randn(SHAPES[0], dtype=torch.double)
    expected = train(copy.deepcopy(layer), composition, x)

    def forward(layer, x):
        return checkpoint(layer, x, use_reentrant=False)

    with use_backend(backend):
        assert_all_close(train(layer, forward, x), expected)


def test_one_wide_map_is_kept():
    """Of 4 C channels, between forward and backward pass."""
    pytest.importorskip('mmdgt._ext', reason='the extension is not built')
    layer = make_layer().float().train()
    x = torch.randn(1, 16, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.profiler.profile(profile_memory=True) as profiler:
        out = layer(x)
    allocated = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    # Beside it the input of the last norm and the output.
    assert out.requires_grad and 6 * x.nbytes <= allocated < 7 * x.nbytes


def test_one_pixel_has_no_variance():
    layer = make_layer().train()
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        layer(torch.randn(1, 16, 1, 1, dtype=torch.double))


def test_a_sum_within_a_convolution():
    conv = ResidualDepthwiseConv(6).double()
    plain = nn.Conv2d(6, 6, 3, padding=1, groups=6).double()
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 6, 4, 5, dtype=torch.double)

    def results(forward, layer):
        inputs = x.clone().requires_grad_()
        out = forward(inputs)
        out.pow(3).sum().backward()
        return out, inputs.grad, *(p.grad for p in layer.parameters())

    assert_all_close(results(conv, conv), results(lambda x: x + plain(x), plain))
