"""Batch norm of GELU on the CPU: the operators, and the layers that use them."""

import copy
import math

import pytest
import torch
from torch import nn

from mmdgt import DGT
from mmdgt.models.gelu_norm import norm_of_gelu
from mmdgt.ops import use_backend
from mmdgt.ops.gelu_batch_norm import ops, serves

pytest.importorskip('mmdgt._ext', reason='the extension is not built')

# Of one pixel; of pixels that no task divides; channels that make one vector, many, and
# more than a task has room for.
SIZES = ((1, 16, 1, 1), (1, 48, 1, 37), (3, 64, 20, 35), (1, 33024, 3, 3))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EPS = 1e-5


def tolerance(dtype):
    """A rounding of the result, and what sums in float32 and GELU leave before."""
    return {torch.float64: 1e-12}.get(dtype, 1e-5 + torch.finfo(dtype).eps)


def draw(size, dtype, seed=0):
    """x and grad (B, C, H, W), channels last; weight and bias (C)."""
    generator = torch.Generator().manual_seed(seed)
    maps = [
        (torch.randn(size, generator=generator).to(dtype) * 2).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    ]
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = torch.rand(2, size[1], generator=generator).to(wide)
    return *maps, weight + 0.5, bias


def gelu(x):
    """By the error function, in float64."""
    x = x.double()
    return x * 0.5 * torch.special.erfc(-x / math.sqrt(2))


def per_channel(numbers):
    return numbers.double()[:, None, None]


def close(actual, expected, dtype):
    scale = max(expected.abs().max().item(), 1.0)
    error = (actual.double() - expected).abs().max().item()
    assert error <= tolerance(dtype) * scale, error / scale


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size', SIZES)
def test_forward(size, dtype):
    x, _, weight, bias = draw(size, dtype)
    s = gelu(x)
    mean, var = ops.gelu_batch_norm_stats(x)
    assert mean.dtype == var.dtype == weight.dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    close(mean, s.mean((0, 2, 3)), exact)
    close(var, s.var((0, 2, 3), correction=0), exact)
    y = ops.gelu_batch_norm_elemt(x, weight, bias)
    assert y.dtype == dtype and y.stride() == x.stride()
    close(y, s * per_channel(weight) + per_channel(bias), dtype)
    ops.gelu_batch_norm_elemt_(x, weight, bias)
    torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_variance_keeps_its_digits_beside_a_large_mean():
    x, *_ = draw((2, 16, 50, 50), torch.float32)
    x += 1e4  # 1 part in 1e3 of its square's rounding is the variance
    _, var = ops.gelu_batch_norm_stats(x)
    expected = gelu(x).var((0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size', SIZES[1:])
def test_backward_reduce(size, dtype):
    x, grad, weight, bias = draw(size, dtype)
    affine = [t.double().requires_grad_() for t in (weight, bias)]
    y = nn.functional.batch_norm(gelu(x), None, None, *affine, training=True, eps=EPS)
    expected_weight, expected_bias = torch.autograd.grad(y, affine, grad.double())
    mean, var = ops.gelu_batch_norm_stats(x)
    sum_dy, sum_dy_xmu = ops.gelu_batch_norm_backward_reduce(grad, x, mean)
    # Independent roundings add up to the root of their number.
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    count = x.numel() / x.shape[1]
    room = tolerance(exact) * math.sqrt(count) * grad.abs().max().item()
    for actual, expected in (
        (sum_dy, expected_bias),
        (sum_dy_xmu * (var + EPS).rsqrt(), expected_weight),
    ):
        assert (actual.double() - expected).abs().max().item() <= room


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size', SIZES[1:])
def test_backward_elemt(size, dtype):
    x, grad, weight, _ = draw(size, dtype)
    scale, slope, shift = ((weight * (1 + i)).contiguous() for i in range(3))
    wide = x.double().requires_grad_()
    s = gelu(wide)
    grad_s = per_channel(scale) * grad.double() + per_channel(slope) * s.detach()
    (expected,) = torch.autograd.grad(s, wide, grad_s + per_channel(shift))
    actual = ops.gelu_batch_norm_backward_elemt(grad, x, scale, slope, shift)
    assert actual.dtype == dtype
    close(actual, expected, dtype)


def test_tails_are_zero_not_subnormal():
    x = torch.linspace(-60, 60, 4801)[None, None, None].repeat(1, 16, 1, 1)
    x = x.contiguous(memory_format=torch.channels_last)
    one, zero = torch.ones(16), torch.zeros(16)
    small = torch.full_like(x, 1e-8)  # as gradients are
    y = ops.gelu_batch_norm_elemt(x, one, zero)
    grad = ops.gelu_batch_norm_backward_elemt(small, x, one, zero, zero)
    for tail in y, grad:
        assert not ((tail != 0) & (tail.abs() < torch.finfo(torch.float32).tiny)).any()
    assert not grad[x < -14].any()  # GELU'(-14) is -1.5e-42
    torch.testing.assert_close(grad[x > 14], small[x > 14], rtol=1e-6, atol=0)


def test_what_is_no_number_stays_in_its_place():
    x = torch.zeros(1, 16, 1, 4).contiguous(memory_format=torch.channels_last)
    x[0, 2, 0, 1], x[0, 4, 0, 3], x[0, 5, 0, 0] = math.nan, math.inf, -1e30
    y = ops.gelu_batch_norm_elemt(x, torch.ones(16), torch.zeros(16))
    assert y[0, 2, 0, 1].isnan() and y[0, 4, 0, 3] == math.inf and y[0, 5, 0, 0] == 0
    y[0, 2, 0, 1] = y[0, 4, 0, 3] = 0
    assert (y == 0).all()


def test_sums_do_not_depend_on_the_threads():
    x, grad, *_ = draw((3, 64, 20, 50), torch.float32)
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        mean, var = ops.gelu_batch_norm_stats(x)
        sums = ops.gelu_batch_norm_backward_reduce(grad, x, mean)
        results.append((mean, var, *sums))
    torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_operators_as_torch_wants_them():
    x, grad, weight, bias = draw((2, 16, 3, 2), torch.float32)
    for name, *arguments in (
        ('stats', x),
        ('elemt', x, weight, bias),
        ('elemt_', x.clone(), weight, bias),
        ('backward_reduce', grad, x, bias),
        ('backward_elemt', grad, x, weight, bias, bias),
    ):
        operator = getattr(ops, f'gelu_batch_norm_{name}').default
        torch.library.opcheck(operator, tuple(arguments))


MAP = torch.ones(1, 16, 2, 3).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ('change', 'message'),
    (
        (dict(x=torch.ones(1, 24, 2, 3)), r'C that 16 divides, got \[1, 24, 2, 3\]'),
        (dict(x=torch.ones(6, 16)), r'x must have shape \(B, C, H, W\)'),
        (dict(x=MAP[:0]), 'not be empty'),
        (dict(x=MAP.contiguous()), 'x must be stored channels last'),
        (dict(grad=MAP[..., :2]), r'grad must be Float of shape \[1, 16, 2, 3\]'),
        (dict(grad=MAP.half()), 'grad must be Float .* got Half'),
        (dict(grad=MAP.contiguous()), 'grad must be .* stored channels last'),
        (dict(scale=torch.ones(15)), r'scale must be contiguous Float of shape \(16\)'),
        (dict(shift=torch.ones(16).double()), 'shift must be .* got Double'),
    ),
)
def test_wrong_arguments(change, message):
    numbers = dict.fromkeys(('scale', 'slope', 'shift'), torch.ones(16))
    arguments = dict(grad=MAP, x=MAP) | numbers | change
    with pytest.raises(RuntimeError, match=message):
        ops.gelu_batch_norm_backward_elemt(*arguments.values())


@pytest.mark.parametrize('momentum', (0.1, None))
def test_norm_of_gelu_equals_its_parts(momentum):
    """Gradients, running statistics, and evaluation."""
    norm = nn.BatchNorm2d(32, momentum=momentum).double()
    plain = copy.deepcopy(norm)
    x = torch.randn(2, 32, 6, 5, dtype=torch.double, requires_grad=True)
    for _ in range(2):
        out, expected = norm_of_gelu(norm, x), plain(nn.functional.gelu(x))
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: norm_of_gelu(norm, x), (x, norm.weight, norm.bias)
    )
    with torch.no_grad():
        expected = norm.eval()(nn.functional.gelu(x))
        actual = norm_of_gelu(norm, x.clone())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    'prepare', ('norm_eval', 'frozen', 'group_norm', 'no_statistics')
)
def test_other_norms_take_the_plain_way(prepare):
    """Where statistics are fixed, or a norm is another one, nothing may change."""
    settings = dict(
        norm_eval=dict(norm_eval=True),
        frozen=dict(frozen_stages=2),
        group_norm=dict(norm_layer=lambda dims: nn.GroupNorm(4, dims)),
        no_statistics=dict(
            norm_layer=lambda dims: nn.BatchNorm2d(dims, track_running_stats=False)
        ),
    )[prepare]
    arch = dict(
        dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 4), stem_dims=16
    )
    torch.manual_seed(0)
    model = DGT(arch, num_groups=4, num_keys=8, **settings).double().train()
    images = torch.randn(2, 3, 64, 64, dtype=torch.double)
    results = []
    for backend in ('reference', 'auto'):
        copied = copy.deepcopy(model)
        with use_backend(backend):
            outs = copied(images)
            sum(out.pow(3).sum() for out in outs).backward()
        grads = [p.grad for p in copied.parameters() if p.grad is not None]
        results.append([*outs, *grads, *copied.buffers()])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_another_norm_without_gradients():
    """In training it takes the statistics of the batch, not those that it keeps."""

    class Other(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x)

    norm = Other(32).double().train()
    plain, x = copy.deepcopy(norm), torch.randn(2, 32, 6, 5, dtype=torch.double)
    with torch.no_grad():
        for _ in range(2):
            expected = plain(nn.functional.gelu(x))
            torch.testing.assert_close(norm_of_gelu(norm, x.clone()), expected)
            norm.eval(), plain.eval()


def test_one_pixel_has_no_variance():
    norm = nn.BatchNorm2d(16).train()
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        norm_of_gelu(norm, torch.randn(1, 16, 1, 1))


def test_where_the_kernels_serve():
    x = torch.ones(1, 16, 2, 2)
    assert serves(x) and serves(x.bfloat16())
    assert not serves(torch.ones(1, 24, 2, 2))
    assert not serves(x.int()) and not serves(x.to('meta')) and not serves(x[:0])
    with use_backend('reference'):
        assert not serves(x)
