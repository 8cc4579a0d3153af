"""Batch norm of GELU on the CPU: the operators, and the layers that use them."""

import copy
import math

import pytest
import torch
from torch import nn

from mmdgt.models.dgt import DGT
from mmdgt.models.gelu_norm import norm_of_gelu
from mmdgt.ops import use_backend
from mmdgt.ops.gelu_norm import ops, serves

pytest.importorskip('mmdgt._ext', reason='the extension is not built')

# One row; rows that no task divides; channels that make one vector, many, and more
# than a task has room for.
SIZES = ((1, 16), (37, 48), (2100, 64), (9, 33024))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EPS = 1e-5


def tolerance(dtype):
    """A rounding of the result, and what sums in float32 and GELU leave before."""
    return {torch.float64: 1e-12}.get(dtype, 1e-5 + torch.finfo(dtype).eps)


def draw(size, dtype, seed=0):
    """x, residual and grad (N, C); weight and bias (C)."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(size, generator=generator).to(dtype) * 2 for _ in range(3)]
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = torch.rand(2, size[1], generator=generator).to(wide)
    return *rows, weight + 0.5, bias


def activation(x, residual):
    """GELU(x) + residual by the error function, in float64."""
    x = x.double()
    s = x * 0.5 * torch.special.erfc(-x / math.sqrt(2))
    return s if residual is None else s + residual.double()


def close(actual, expected, dtype):
    scale = max(expected.abs().max().item(), 1.0)
    error = (actual.double() - expected).abs().max().item()
    assert error <= tolerance(dtype) * scale, error / scale


@pytest.mark.parametrize('with_residual', (False, True))
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size', SIZES)
def test_forward(size, dtype, with_residual):
    x, residual, _, weight, bias = draw(size, dtype)
    residual = residual if with_residual else None
    s = activation(x, residual)
    place = residual.clone() if with_residual else None
    mean, var = ops.gelu_statistics(x, place)
    if with_residual:
        close(place, s, dtype)
    assert mean.dtype == var.dtype == weight.dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    close(mean, s.mean(0), exact)
    close(var, s.var(0, correction=0), exact)
    out = ops.gelu_norm(x, residual, weight, bias)
    assert out.dtype == dtype
    close(out, s * weight.double() + bias.double(), dtype)
    ops.gelu_norm_(x, residual, weight, bias)
    torch.testing.assert_close(x, out, rtol=0, atol=0)


def test_variance_keeps_its_digits_beside_a_large_mean():
    x, residual, *_ = draw((5000, 16), torch.float32)
    residual += 1e4  # 1 part in 1e3 of its square's rounding is the variance
    s = activation(x, residual)
    _, var = ops.gelu_statistics(x, residual.clone())
    torch.testing.assert_close(var.double(), s.var(0, correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize('with_more', (False, True))
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size', SIZES[1:])
def test_sums_of_gradients(size, dtype, with_more):
    x, more, grad, weight, bias = draw(size, dtype)
    more = more if with_more else None
    # What is stored is rounded, what is summed up is not.
    added = grad + more if with_more else grad.clone()
    exact_grad = grad.double() + (more.double() if with_more else 0)
    affine = [t.double().requires_grad_() for t in (weight, bias)]
    s = activation(x, None)
    y = nn.functional.batch_norm(s, None, None, *affine, training=True, eps=EPS)
    expected_weight, expected_bias = torch.autograd.grad(y, affine, exact_grad)
    mean, var = ops.gelu_statistics(x, None)
    total, product = ops.gelu_norm_sums(grad, more, x, mean)
    torch.testing.assert_close(grad, added, rtol=0, atol=0)
    # A sum of so many roundings may be off by their root.
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    room = 10 * tolerance(exact) * size[0] * exact_grad.abs().max().item()
    for actual, expected in (
        (total, expected_bias),
        (product * (var + EPS).rsqrt(), expected_weight),
    ):
        assert (actual.double() - expected).abs().max().item() <= room


@pytest.mark.parametrize('with_residual', (False, True))
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size', SIZES[1:])
def test_gradient_of_the_rows(size, dtype, with_residual):
    x, residual, grad, weight, _ = draw(size, dtype)
    s = activation(x, residual if with_residual else None)
    scale, slope, shift = ((weight * (1 + i)).contiguous() for i in range(3))
    grad_s = scale.double() * grad.double() + slope.double() * s + shift.double()
    wide = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(activation(wide, None), wide, grad_s)
    place = s.to(dtype) if with_residual else None
    ops.gelu_norm_backward_(grad, x, place, scale, slope, shift)
    close(grad, expected, dtype)
    if with_residual:
        close(place, grad_s, dtype)


def test_what_is_no_number_stays_in_its_place():
    x = torch.zeros(4, 16)
    x[1, 2], x[3, 4], x[0, 5] = math.nan, math.inf, -1e30
    out = ops.gelu_norm(x, None, torch.ones(16), torch.zeros(16))
    assert out[1, 2].isnan() and out[3, 4] == math.inf and out[0, 5] == 0
    out[1, 2] = out[3, 4] = 0
    assert (out == 0).all()


def test_sums_do_not_depend_on_the_threads():
    x, residual, *_ = draw((3000, 64), torch.float32)
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(ops.gelu_statistics(x, residual.clone()))
    torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_operators_as_torch_wants_them():
    x, residual, grad, weight, bias = draw((6, 16), torch.float32)
    for r in (None, residual):
        place = None if r is None else r.clone()
        torch.library.opcheck(ops.gelu_statistics.default, (x, place))
        torch.library.opcheck(ops.gelu_norm.default, (x, r, weight, bias))
        torch.library.opcheck(ops.gelu_norm_.default, (x.clone(), r, weight, bias))
        torch.library.opcheck(ops.gelu_norm_sums.default, (grad.clone(), r, x, bias))
        torch.library.opcheck(
            ops.gelu_norm_backward_.default,
            (grad.clone(), x, place, weight, bias, bias),
        )


@pytest.mark.parametrize(
    ('change', 'message'),
    (
        (dict(x=torch.ones(4, 24)), r'C a multiple of 16, got \[4, 24\]'),
        (dict(x=torch.ones(16)), r'x must have shape \(N, C\)'),
        (dict(x=torch.ones(16, 4).mT), 'x must be contiguous'),
        (dict(residual=torch.ones(3, 16)), r'residual must be .* of shape \[4, 16\]'),
        (dict(residual=torch.ones(4, 16).half()), 'residual must be contiguous Float'),
        (dict(scale=torch.ones(15)), r'scale must be contiguous Float of shape \(16\)'),
        (dict(shift=torch.ones(16).double()), 'shift must be .* got Double'),
    ),
)
def test_wrong_arguments(change, message):
    arguments = dict(
        x=torch.ones(4, 16), residual=None, scale=torch.ones(16), shift=torch.ones(16)
    )
    with pytest.raises(RuntimeError, match=message):
        ops.gelu_norm(*(arguments | change).values())


def test_norm_of_gelu_equals_its_parts():
    norm = nn.BatchNorm2d(32).double()
    x = torch.randn(2, 32, 6, 5, dtype=torch.double)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: norm_of_gelu(norm, x), (x, norm.weight, norm.bias)
    )
    plain = copy.deepcopy(norm).eval()
    with torch.no_grad():
        expected = plain(nn.functional.gelu(x))
        actual = norm_of_gelu(norm.eval(), x.clone())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    'prepare', ('norm_eval', 'frozen', 'group_norm', 'no_statistics')
)
def test_other_norms_take_the_plain_way(prepare):
    """Where statistics are fixed, or a norm is another one, nothing may change."""
    settings = dict(
        norm_eval=dict(norm_eval=True),
        frozen=dict(frozen_stages=2),
        group_norm=dict(norm_cfg=dict(type='GN', num_groups=4)),
        no_statistics=dict(norm_cfg=dict(type='BN', track_running_stats=False)),
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


def test_where_the_kernels_serve():
    x = torch.ones(1, 16, 2, 2)
    assert serves(x) and serves(x.bfloat16())
    assert not serves(torch.ones(1, 24, 2, 2))
    assert not serves(x.int()) and not serves(x.to('meta')) and not serves(x[:0])
    with use_backend('reference'):
        assert not serves(x)
