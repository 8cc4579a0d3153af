"""Depth-wise convolutions on the CPU against PyTorch's in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmdgt.ops import use_backend
from mmdgt.ops.depthwise_conv import depthwise_conv, ops

pytest.importorskip('mmdgt._ext', reason='the extension is not built')

# One pixel, one row, one column; images of odd sizes; as many parts as rows and fewer.
SIZES = ((1, 16, 1, 1), (2, 32, 1, 5), (2, 16, 7, 1), (3, 48, 5, 9), (2, 16, 40, 6))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def draw(size, dtype=torch.float64):
    """x and grad (B, C, H, W), channels last; weight (C, 1, 3, 3) and bias (C)."""
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(size, generator=generator)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    ]
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.randn(size[1], 1, 3, 3, generator=generator).to(wide)
    return *maps, weight, torch.randn(size[1], generator=generator).to(wide)


def gradients(convolve, x, grad, weight, bias):
    inputs = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    out = convolve(*inputs)
    return out, *torch.autograd.grad(out, inputs, grad)


def plain(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size', SIZES)
def test_convolution_and_gradients(size, dtype):
    arguments = draw(size, dtype)
    expected = gradients(plain, *(t.double() for t in arguments))
    actual = gradients(depthwise_conv, *arguments)
    types = dtype, dtype, arguments[2].dtype, arguments[3].dtype
    for one, other, out_type in zip(actual, expected, types, strict=True):
        assert one.dtype == out_type
        room = {torch.float64: 1e-12}.get(dtype, 1e-5)
        room += torch.finfo(out_type).eps * (out_type != torch.float64)
        error = (one.double() - other).abs().max()
        assert error <= room * max(other.abs().max().item(), 1)


def test_any_layout():
    x, grad, weight, bias = draw((2, 16, 6, 5))
    expected = gradients(plain, x, grad, weight, bias)
    actual = gradients(depthwise_conv, x.contiguous(), grad.contiguous(), weight, bias)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gradients_do_not_depend_on_the_threads():
    x, grad, weight, _ = draw((2, 16, 30, 20), torch.float32)
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(ops.depthwise_conv_backward(grad, x, weight))
    torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_operators_as_torch_wants_them():
    x, grad, weight, bias = draw((2, 16, 3, 4), torch.float32)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    torch.library.opcheck(ops.depthwise_conv.default, (x, weight, bias))
    arguments = tuple(t.detach() for t in (grad, x, weight))
    torch.library.opcheck(ops.depthwise_conv_backward.default, arguments)


@pytest.mark.parametrize('backend', ('auto', 'reference'))
def test_autocast_leaves_the_residual_stream_as_it_is(backend):
    x, _, weight, bias = draw((1, 16, 4, 4), torch.float32)
    expected = plain(x, weight, bias)
    with use_backend(backend), torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(depthwise_conv(x, weight, bias), expected)
        assert depthwise_conv(x.bfloat16(), weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize('backend', ('auto', 'reference'))
def test_flops(backend):
    x, _, weight, bias = draw((2, 16, 6, 5))
    with use_backend(backend), FlopCounterMode(display=False) as counter:
        depthwise_conv(x, weight, bias)
    assert counter.get_total_flops() == 2 * 9 * x.numel()


def test_flops_of_the_gradients():
    """Two products more; torch's own count forgets the groups there."""
    pytest.importorskip('mmdgt._ext', reason='the extension is not built')
    x, grad, weight, bias = draw((2, 16, 6, 5))
    with FlopCounterMode(display=False) as counter:
        gradients(depthwise_conv, x, grad, weight, bias)
    assert counter.get_total_flops() == 3 * 2 * 9 * x.numel()


MAP = torch.ones(1, 16, 2, 3).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ('change', 'message'),
    (
        (dict(x=torch.ones(1, 24, 2, 3)), r'C that 16 divides, got \[1, 24, 2, 3\]'),
        (dict(x=MAP.contiguous()), 'x must be stored channels last'),
        (dict(weight=torch.ones(16, 9)), r'weight must have shape \(16, 1, 3, 3\)'),
        (dict(bias=torch.ones(15)), r'bias must have shape \(16\), got \[15\]'),
    ),
)
def test_wrong_arguments(change, message):
    arguments = dict(x=MAP, weight=torch.ones(16, 1, 3, 3), bias=torch.ones(16))
    with pytest.raises(RuntimeError, match=message):
        ops.depthwise_conv(*(arguments | change).values())
