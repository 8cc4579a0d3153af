"""Assignment, selection and attention in one launch, for few tokens."""

import pytest
import torch
from test_ops_cuda import (
    DEVICE,
    HALVES,
    attend_with_grads,
    centroids_of,
    error,
    integers,
    ops,
    projection,
    pytestmark,  # noqa: F401
    randn,
    ranked,
)

from mmdgt import DynamicGroupAttention
from mmdgt.models import attention
from mmdgt.ops import use_backend
from mmdgt.ops.functional import choose_and_attend


def masks_of(index, num_tokens):
    """Bits of the tokens in index (B, H, G, K), (B, H, G, num_tokens)."""
    bits = torch.zeros(*index.shape[:3], num_tokens, device=DEVICE, dtype=torch.bool)
    return bits.scatter(-1, index.long(), True)


def unpack(masks, num_tokens):
    places = torch.arange(32, device=DEVICE)
    return (masks.unsqueeze(-1) >> places & 1).bool().flatten(-2)[..., :num_tokens]


def check_sums(sums, query, of_group):
    """Compare the sums of eq. 3 with those in float64; of_group is (B, H, L, G)."""
    expected = torch.nn.functional.normalize(query.double(), dim=-1)
    expected = (of_group.double().mT @ expected).sum(0)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)


SIZES = [
    # B, H, L, D, G, K
    (2, 2, 196, 32, 48, 98),
    (1, 2, 49, 32, 48, 49),
    (1, 1, 1, 32, 3, 1),
    (1, 2, 17, 8, 1, 5),
    (1, 2, 250, 24, 100, 17),
    (1, 1, 256, 32, 256, 200),
    (1, 1, 225, 16, 49, 1),
    (1, 1, 196, 32, 255, 98),
]


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('B, H, L, D, G, K', SIZES)
def test_choices_are_exact(dtype, B, H, L, D, G, K):
    q, k = (integers(B, H, L, D, dtype=dtype, seed=s) for s in (0, 5))
    centroids = integers(H, G, D, seed=1)
    _, _, group, masks, sums, counts = ops.choose_and_attend(
        q, k, k, centroids, K, D**-0.5, True
    )
    scores = centroids.double() @ q.double().mT
    assert torch.equal(group.long(), scores.argmax(2))
    index = ranked(centroids.double() @ k.double().mT)[..., :K]
    assert torch.equal(unpack(masks, L), masks_of(index, L))
    assert not unpack(masks, 256)[..., L:].any()
    of_group = torch.nn.functional.one_hot(group.long(), G)
    assert torch.equal(counts, of_group.sum((0, 2)).int())
    check_sums(sums, q, of_group)


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('B, H, L, D, G, K', SIZES)
def test_attention_and_gradients(dtype, B, H, L, D, G, K):
    q, k, v = (x.detach().requires_grad_() for x in projection(B, H, L, D, dtype))
    centroids, scale = centroids_of(H, G, D), D**-0.5
    out, lse, group, masks, _, _ = ops.choose_and_attend(
        q, k, v, centroids, K, scale, False
    )
    index = ops.select_keys(k.detach(), centroids, K, False)
    assert torch.equal(group, ops.assign_queries(q.detach(), centroids, False)[0])
    assert torch.equal(unpack(masks, L), masks_of(index, L))
    grad = randn(B, L, H, D, dtype=dtype, seed=9).transpose(1, 2)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    args = (q, k, v, group, index, scale, grad)
    expected, expected_lse = attend_with_grads(*args, torch.float64)
    plain, _ = attend_with_grads(*args, dtype)
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    for ours, true, rounded in zip((out, *grads), expected, plain):
        assert error(ours, true) <= 2 * error(rounded, true) + 1e-4


@pytest.mark.parametrize('scale', [-0.3, 0.0, 1e-38, 5.0])
@pytest.mark.parametrize('dtype', HALVES)
def test_any_scale(scale, dtype):
    q, k, v = projection(1, 1, 150, 32, dtype)
    centroids = centroids_of(1, 9, 32)
    out, lse, group, masks, *_ = ops.choose_and_attend(
        q, k, v, centroids, 50, scale, False
    )
    index = ops.select_keys(k, centroids, 50, False)
    grad = randn(1, 1, 150, 32, dtype=dtype, seed=9)
    expected, _ = attend_with_grads(q, k, v, group, index, scale, grad, torch.float64)
    grads = ops.choose_and_attend_backward(grad, q, k, v, group, masks, out, lse, scale)
    for ours, true in zip((out, *grads), expected):
        assert error(ours, true) < 2e-2


@pytest.mark.parametrize('size', [8.0, 30.0, 1e3])
@pytest.mark.parametrize('dtype', HALVES)
def test_scores_that_leave_the_range_of_an_exponential(size, dtype):
    q, k, v = projection(1, 2, 100, 32, dtype)
    q, k = q * size, k * size
    centroids = centroids_of(2, 9, 32)
    out, lse, group, *_ = ops.choose_and_attend(q, k, v, centroids, 30, 0.2, False)
    index = ops.select_keys(k, centroids, 30, False)
    expected, expected_lse = attend_with_grads(
        q, k, v, group, index, 0.2, out, torch.float64
    )
    assert error(out, expected[0]) < 1e-2
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('kind', ['equal', 'outlier', 'two values', 'nan', 'infinity'])
def test_choices_among_awkward_scores(kind):
    L, K = 196, 98
    key, centroids = integers(1, 1, L, 32, dtype=torch.bfloat16), integers(1, 20, 32)
    centroids[..., 0] = 1
    if kind == 'equal':
        key = torch.ones_like(key)
    elif kind == 'outlier':
        key[0, 0, 17, 0] = 3e4  # the others share a bin
    elif kind == 'two values':
        key = torch.where(key[..., :1] > 0, 1.0, -1.0).bfloat16().expand_as(key)
    elif kind == 'nan':
        key[0, 0, [5, 100], 7] = torch.nan
    else:
        key[0, 0, [5, 100], 0] = key.new_tensor([torch.inf, -torch.inf])
    key = key.contiguous()
    masks = ops.choose_and_attend(key, key, key, centroids, K, 0.2, False)[3]
    index = ops.select_keys(key, centroids, K, False)
    assert torch.equal(unpack(masks, L), masks_of(index, L))
    assert (unpack(masks, L).sum(-1) == K).all()


@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
def test_what_is_not_finite_stays_where_it_is_seen(bad):
    L, K, G = 196, 30, 11
    q, k, v = (x.clone() for x in projection(1, 1, L, 32, torch.bfloat16))
    centroids = centroids_of(1, G, 32)
    v[0, 0, 9, 3] = bad
    out, lse, group, masks, *_ = ops.choose_and_attend(
        q, k, v, centroids, K, 0.2, False
    )
    sees = unpack(masks, L)[0, 0, group[0, 0].long(), 9]
    assert sees.any() and not sees.all()
    assert torch.equal(out[0, 0].isfinite().all(-1), ~sees)
    assert lse.isfinite().all()


def test_sums_of_few_at_the_ends_of_the_range():
    q = projection(2, 2, 100, 32, torch.float16)[0].clone()
    q[0, 0, :20] *= 2**-14  # shorter than 1 / 65504
    q[0, 1, :20] *= 2**12
    q[1, 0, :20] = 0
    q[1, 1, 5, 3] = torch.nan
    centroids = centroids_of(2, 9, 32)
    *_, group, _, sums, counts = ops.choose_and_attend(q, q, q, centroids, 5, 0.2, True)
    of_group = torch.nn.functional.one_hot(group.long(), 9)
    assert torch.equal(counts, of_group.sum((0, 2)).int())
    check_sums(sums[:1], q[:, :1], of_group[:, :1])
    other = torch.arange(9, device=DEVICE) != group[1, 1, 5]
    assert sums[1, ~other].isnan().all()
    q[1, 1, 5] = 0  # its group aside, nobody sees it
    check_sums(sums[1:, other], q[:, 1:], of_group[:, 1:, :, other])


WRONG = [
    # argument, what is done to it, what is said
    ('grad_out', lambda x: x[:, :, :20], 'grad_out has shape'),
    ('grad_out', lambda x: x.float(), 'grad_out is Float, but query is BFloat16'),
    ('query', lambda x: x[0], r'query must have shape \(B, H, L, D\)'),
    ('key', lambda x: x.float(), 'key is Float, but query is BFloat16'),
    ('key', lambda x: x[:, :, ::2], 'key has shape'),
    ('value', lambda x: x.mT.contiguous().mT, "value's last dimension must have"),
    ('value', lambda x: x[:, :1], 'value has shape'),
    ('group', lambda x: x.long(), 'group must be contiguous int32, got Long'),
    ('group', lambda x: x[:1], r'group must have shape \(B, H, L\)'),
    ('masks', lambda x: x.long(), 'masks must be contiguous int32, got Long'),
    ('masks', lambda x: x[:, :, :1], r'masks must .* got Int with strides'),
    ('masks', lambda x: x[:, :1].contiguous(), r'masks must have shape .* H = 2'),
    ('masks', lambda x: x.mT.contiguous(), r'masks must have shape \(B, H, G, 8\)'),
    ('masks', lambda x: x.mT.contiguous().mT, 'masks must be contiguous int32'),
    ('masks', lambda x: x[:, :, :0].contiguous(), 'number of groups must be 1 to 256'),
    ('out', lambda x: x.float(), 'out is Float, but query is BFloat16'),
    ('out', lambda x: x[..., :24], 'out has shape'),
    ('logsumexp', lambda x: x.double(), 'logsumexp must be contiguous Float'),
    ('logsumexp', lambda x: x.mT.contiguous().mT, 'logsumexp must be contiguous'),
    ('logsumexp', lambda x: x[..., :9].contiguous(), r'logsumexp .* \[2, 2, 9\]'),
]


@pytest.mark.parametrize(('name', 'change', 'message'), WRONG)
def test_wrong_arguments_of_the_backward_pass(name, change, message):
    q, k, v = projection(2, 2, 40, 32, torch.bfloat16)
    centroids = centroids_of(2, 9, 32)
    out, lse, group, masks, *_ = ops.choose_and_attend(
        q, k, v, centroids, 5, 0.2, False
    )
    arguments = dict(grad_out=out, query=q, key=k, value=v)
    arguments |= dict(group=group, masks=masks, out=out, logsumexp=lse)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        ops.choose_and_attend_backward(*arguments.values(), 0.2)


def test_repeats_bit_by_bit_and_checks_its_arguments(monkeypatch):
    q, k, v = projection(2, 2, 196, 32, torch.bfloat16)
    centroids = centroids_of(2, 48, 32)
    args = (q, k, v, centroids, 98, 0.2, True)

    def run(seed):
        # A schedule of its own, as a GPU takes one anyway.
        monkeypatch.setenv('MMDGT_EMULATE_SHUFFLE', str(seed))
        return ops.choose_and_attend(*args)

    for x, y in zip(run(1), run(2)):
        assert torch.equal(x, y)
    with pytest.raises(RuntimeError, match='up to 256 tokens'):
        wide = randn(1, 2, 257, 32, dtype=torch.bfloat16)
        ops.choose_and_attend(wide, wide, wide, centroids, 98, 0.2, True)
    with pytest.raises(RuntimeError, match='float16 or bfloat16'):
        ops.choose_and_attend(q.float(), k.float(), v.float(), centroids, 98, 0.2, True)


@pytest.mark.parametrize('shape', [(0, 2, 10, 32), (2, 2, 0, 32)])
def test_nothing_to_do(shape):
    q = torch.zeros(shape, device=DEVICE, dtype=torch.bfloat16)
    centroids = torch.zeros(2, 4, 32, device=DEVICE)
    out, *_, sums, counts = ops.choose_and_attend(q, q, q, centroids, 5, 1.0, True)
    assert out.shape == shape and not sums.any() and not counts.any()


class InSteps(DynamicGroupAttention):
    """The same, but a step is overridden."""

    def choose(self, query, key):
        return super().choose(query, key)


class Spy:
    def __init__(self):
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return choose_and_attend(*args, **kwargs)


@pytest.fixture
def spy(monkeypatch):
    monkeypatch.setattr(attention, 'choose_and_attend', Spy())
    return attention.choose_and_attend


@pytest.mark.parametrize('cosine', [False, True])
@pytest.mark.parametrize('training', [True, False])
def test_the_layer_takes_it_unless_a_step_is_overridden(spy, training, cosine):
    sizes = dict(dims=64, num_heads=2, num_groups=12, num_keys=30, cosine=cosine)
    x = randn(2, 14, 14, 64, dtype=torch.bfloat16)
    outcomes = []
    for layer, calls in ((DynamicGroupAttention, 1), (InSteps, 1)):
        torch.manual_seed(0)
        layer = layer(**sizes).to(DEVICE, torch.bfloat16).train(training)
        own = x.clone().requires_grad_()
        out = layer(own)
        out.square().sum().backward()
        assert spy.calls == calls
        grads = [p.grad for p in layer.parameters()]
        outcomes.append((layer.group_sums, layer.group_counts, out, own.grad, *grads))
    assert outcomes[0][1].any() == training
    for ours, expected in zip(*outcomes):
        torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)


class Values(DynamicGroupAttention):
    """Every token gets its own value, whatever its group sees."""

    def attend(self, query, key, value, group, index, scale):
        assert group.shape == query.shape[:3] and index.shape[-1] == self.num_keys
        return value


@pytest.mark.parametrize('training', [True, False])
def test_another_way_to_attend_is_taken(spy, training):
    layer = Values(64, 2, num_groups=12, num_keys=30).to(DEVICE, torch.bfloat16)
    x = randn(2, 14, 14, 64, dtype=torch.bfloat16)
    value = layer.project(x)[2]
    out = layer.train(training)(x)
    assert spy.calls == 0
    assert torch.equal(out, layer.join(value, x.shape))


@pytest.mark.parametrize('layer', [DynamicGroupAttention, InSteps])
def test_the_counter_of_mmengine_counts_it(layer):
    analysis = pytest.importorskip('mmengine.analysis')
    pytest.importorskip('mmdgt.openmmlab')
    L, C, G, K = 196, 64, 12, 30
    layer = layer(C, 2, num_groups=G, num_keys=K).to(DEVICE, torch.bfloat16)
    analyzer = analysis.FlopAnalyzer(layer, randn(1, L, C, dtype=torch.bfloat16))
    choosing, attending, projections = 2 * L * G * C, 2 * L * K * C, 4 * L * C * C
    assert analyzer.total() == choosing + attending + projections  # eq. 6


def test_the_layer_does_without_where_the_kernel_does_not_serve(spy):
    sizes = dict(num_heads=2, num_groups=12, num_keys=30)
    layer = DynamicGroupAttention(64, **sizes).to(DEVICE)
    wide = DynamicGroupAttention(128, **sizes).to(DEVICE, torch.bfloat16)
    layer(randn(1, 196, 64))  # float32
    wide(randn(1, 196, 128, dtype=torch.bfloat16))
    layer.to(torch.bfloat16)
    layer(randn(1, 257, 64, dtype=torch.bfloat16))
    with use_backend('reference'):
        layer(randn(1, 196, 64, dtype=torch.bfloat16))
    assert spy.calls == 0
    with torch.autocast(DEVICE, torch.bfloat16):
        layer.float()(randn(1, 196, 64))
    assert spy.calls == 1


def test_is_what_compilers_expect():
    q, k, v = (x.detach().requires_grad_() for x in projection(1, 2, 49, 32, HALVES[1]))
    centroids = centroids_of(2, 5, 32)
    args = (q, k, v, centroids, 9, 0.2, True)
    torch.library.opcheck(ops.choose_and_attend.default, args)
    out, lse, group, masks, *_ = (x.detach() for x in ops.choose_and_attend(*args))
    q, k, v = (x.detach() for x in (q, k, v))
    args = (out, q, k, v, group, masks, out, lse, 0.2)
    torch.library.opcheck(ops.choose_and_attend_backward.default, args)


def test_the_layer_compiles_into_one_graph():
    layer = DynamicGroupAttention(64, 2, num_groups=12, num_keys=30)
    layer = layer.to(DEVICE, torch.bfloat16)
    x = randn(1, 196, 64, dtype=torch.bfloat16)
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
