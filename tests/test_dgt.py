"""The backbone: its parts against loops, its sizes against the paper."""

from functools import partial

import loops
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmdgt import DGT, update_centroids
from mmdgt.models import DynamicGroupAttention, GlobalAttention
from mmdgt.models.blocks import Block, DropPath, LayerNorm2d, PatchMerging, Stem
from mmdgt.models.feed_forward import IRFFN

TINY = dict(
    dims=(8, 16, 16, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), stem_dims=8
)
BN = nn.BatchNorm2d


def small(**kwargs):
    arch = dict(TINY, post_norm=kwargs.pop('post_norm', False))
    return DGT(arch, num_groups=6, num_keys=10, **kwargs)


def to_numpy(x):
    return x.detach().double().numpy()


# Published: parameters in M, FLOPs in G at 224 x 224 with K = 98 (table 1).
PUBLISHED = {'tiny': (24.09, 4.35), 'small': (51.76, 9.41), 'base': (90.28, 16.4)}


def classifier(arch):
    backbone = DGT(arch, num_keys=98, out_indices=(3,), out_norm=False)
    dims = backbone.stages[3].blocks[0].norm1.normalized_shape[0]
    head = nn.Sequential(nn.Linear(dims, 1280), nn.GELU(), nn.Linear(1280, 1000))

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = backbone, head

        def forward(self, x):
            return self.head(self.backbone(x)[0].mean((2, 3)))

    return Classifier().eval()


@pytest.mark.parametrize('arch', PUBLISHED)
def test_parameters_and_flops_of_table_1(arch):
    model = classifier(arch)
    params, flops = PUBLISHED[arch]
    counted = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(counted, 2) == params

    image = torch.randn(1, 3, 224, 224)
    # torch counts two for each multiply-add, and no norms.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(flops, rel=0.025)


@pytest.mark.parametrize(
    ('alias', 'name'), [('t', 'tiny'), ('S', 'small'), ('b', 'base')]
)
def test_aliases(alias, name):
    with torch.device('meta'):
        one, other = DGT(alias), DGT(name)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (one, other)]
    assert shapes[0] == shapes[1]


def test_the_last_stage_attends_globally():
    model = small()
    kinds = [type(stage.blocks[0].attention) for stage in model.stages]
    assert kinds == [DynamicGroupAttention] * 3 + [GlobalAttention]


def normalise(x, axis, weight=1.0, bias=0.0, eps=1e-5):
    mean, variance = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def gelu(x):
    return to_numpy(nn.functional.gelu(torch.as_tensor(x)))


def pointwise(x, conv):
    """x (C, H, W) through a 1x1 convolution."""
    weight, bias = to_numpy(conv.weight)[..., 0, 0], to_numpy(conv.bias)
    return np.einsum('oc,chw->ohw', weight, x) + bias[:, None, None]


def irffn(layer, x):
    """CMT's inverted residual feed-forward network; x (C, H, W), batch of one."""
    x = normalise(gelu(pointwise(x, layer.expand)), (1, 2))
    inner = loops.conv3x3(
        x, to_numpy(layer.depthwise.weight), to_numpy(layer.depthwise.bias), len(x)
    )
    x = normalise(gelu(x + inner), (1, 2))
    return normalise(pointwise(x, layer.reduce), (1, 2))


def test_irffn():
    layer = IRFFN(4, 3).train()
    x = torch.randn(1, 4, 5, 6)
    np.testing.assert_allclose(
        to_numpy(layer(x))[0], irffn(layer, to_numpy(x)[0]), atol=2e-5
    )


class Doubling(nn.Module):
    """Stands for an attention whose result is easy to know."""

    def forward(self, x):
        return 2 * x.flip(1, 2)


@pytest.mark.parametrize('post_norm', [False, True])
def test_block_follows_equations_8_to_10(post_norm):
    block = Block(4, Doubling(), 3, post_norm, DropPath(0.0), BN, with_cp=False).train()
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(1, 4, 3, 5)

    def layer_norm(y, norm):
        weight, bias = (to_numpy(p)[:, None, None] for p in (norm.weight, norm.bias))
        return normalise(y, 0, weight, bias)

    def attend(y):
        return 2 * y.reshape(4, -1)[:, ::-1].reshape(y.shape)

    y = to_numpy(x)[0]
    y = y + loops.conv3x3(y, to_numpy(block.cpe.weight), to_numpy(block.cpe.bias), 4)
    if post_norm:
        y = y + layer_norm(attend(y), block.norm1)
        y = y + layer_norm(irffn(block.irffn, y), block.norm2)
    else:
        y = y + attend(layer_norm(y, block.norm1))
        y = y + irffn(block.irffn, layer_norm(y, block.norm2))
    np.testing.assert_allclose(to_numpy(block(x))[0], y, atol=5e-5)


def test_stem_and_merging():
    stem, merge = Stem(3, 4, BN).train(), PatchMerging(4, 6)
    x = torch.randn(1, 3, 8, 10)
    y = to_numpy(x)[0]
    for i, stride in ((0, 2), (3, 1), (6, 1)):
        conv = stem[i]
        y = loops.conv3x3(y, to_numpy(conv.weight), to_numpy(conv.bias))
        y = normalise(gelu(y[:, ::stride, ::stride]), (1, 2))
    np.testing.assert_allclose(to_numpy(stem(x))[0], y, atol=2e-5)
    y = loops.conv3x3(y, to_numpy(merge[0].weight), to_numpy(merge[0].bias))
    y = normalise(y[:, ::2, ::2], 0)
    np.testing.assert_allclose(to_numpy(merge(stem(x)))[0], y, atol=5e-5)
    assert isinstance(merge[1], LayerNorm2d)


# 32 x 32 leaves four tokens in stage 3, fewer than groups or keys.
@pytest.mark.parametrize('size', [(32, 32), (33, 47), (64, 100), (129, 35)])
@pytest.mark.parametrize('post_norm', [False, True])
def test_any_size(size, post_norm):
    model = small(post_norm=post_norm)
    outs = model(torch.randn(2, 3, *size))
    assert len(outs) == 4
    for i, out in enumerate(outs):
        expected = [-(-side // 2 ** (i + 2)) for side in size]
        assert out.shape == (2, TINY['dims'][i], *expected)
        assert out.isfinite().all()
    sum(out.sum() for out in outs).backward()


@pytest.mark.parametrize('post_norm', [False, True])
def test_a_batch_equals_its_images_alone(post_norm):
    model = small(post_norm=post_norm).eval()
    images = torch.randn(3, 3, 40, 56)
    together = model(images)
    for i in range(3):
        for out, alone in zip(together, model(images[i : i + 1]), strict=True):
            torch.testing.assert_close(out[i : i + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('out_indices', [(0,), (1, 3), (2,), (0, 1, 2, 3)])
def test_every_parameter_is_used(out_indices):
    """So that DistributedDataParallel needs no find_unused_parameters."""
    model = small(out_indices=out_indices)
    outs = model(torch.randn(1, 3, 64, 64))
    assert [out.shape[1] for out in outs] == [TINY['dims'][i] for i in out_indices]
    sum(out.square().sum() for out in outs).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('momentum', [0.1, None])
def test_checkpointing_changes_neither_gradients_nor_statistics(momentum):
    norm = partial(nn.BatchNorm2d, momentum=momentum)
    plain, saving = small(norm_layer=norm), small(norm_layer=norm, with_cp=True)
    saving.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for model in (plain, saving):
        model.train()
        sum(out.square().mean() for out in model(images)).backward()
        update_centroids(model, 0.3)
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)
    buffers = zip(plain.named_buffers(), saving.named_buffers(), strict=True)
    for (name, one), (_, other) in buffers:
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize('frozen', [-1, 0, 1, 4])
def test_frozen_stages(frozen):
    model = small(frozen_stages=frozen).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    outs = model(torch.randn(2, 3, 64, 64).requires_grad_())
    sum((out * torch.randn_like(out)).sum() for out in outs).backward()
    optimizer.step()
    update_centroids(model, 0.3)

    covered = ['stem.'] * (frozen >= 0)
    for i in range(frozen):
        covered += [f'stages.{i}.', f'norm{i}.']
    for name, x in model.state_dict().items():
        kept = name.startswith(tuple(covered))
        moves = 'centroids' in name or 'running' in name or name.endswith('.weight')
        if kept:
            assert torch.equal(x, before[name]), name
        elif moves:
            assert not torch.equal(x, before[name]), name


def test_norm_eval():
    model = small(norm_eval=True).train()
    modes = {m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert modes == {False}
    assert model.stages[0].blocks[0].attention.training


def test_norm_layer():
    model = small(norm_layer=partial(nn.GroupNorm, 4))
    kinds = {type(m) for m in model.modules()}
    assert nn.GroupNorm in kinds and nn.BatchNorm2d not in kinds


def test_drop_path_rises_to_its_rate():
    model = small(drop_path_rate=0.4)
    rates = [b.drop_path.drop_prob for s in model.stages for b in s.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    layer, x = DropPath(0.25).train(), torch.ones(4000, 2, 3)
    factor = layer(x).flatten(1)
    assert (factor == factor[:, :1]).all()
    kept = factor[:, 0] != 0
    torch.testing.assert_close(factor[kept], torch.full_like(factor[kept], 4 / 3))
    assert abs(kept.double().mean() - 0.75) < 0.03  # more than four deviations
    assert layer.eval()(x) is x


def test_another_number_of_keys():
    one, other = small().eval(), DGT(TINY, num_groups=6, num_keys=4).eval()
    other.load_state_dict(one.state_dict())
    image = torch.randn(1, 3, 64, 64)
    expected = other(image)
    one.set_num_keys(4)
    assert all(map(torch.equal, one(image), expected))
    with pytest.raises(ValueError, match='num_keys must be at least 1, got 0'):
        one.set_num_keys(0)


def test_linear_layers_start_small():
    weights = [
        m.weight.detach() for m in DGT('tiny').modules() if isinstance(m, nn.Linear)
    ]
    for weight in weights:
        assert weight.std() == pytest.approx(0.02, rel=0.03)
        assert weight.abs().max() < 2  # truncated there


def with_statistics(model):
    """Norms as after a training, not as new: factors, shifts, means and variances."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for x in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(x)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@pytest.mark.parametrize('post_norm', [False, True])
def test_switch_to_deploy_keeps_the_outputs(post_norm):
    model = with_statistics(small(post_norm=post_norm)).double()
    images = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    expected = model(images)
    model.switch_to_deploy()
    for ours, true in zip(model(images), expected, strict=True):
        torch.testing.assert_close(ours, true, atol=1e-13, rtol=1e-13)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_switch_to_deploy_ends_training():
    model = small().train()
    model.switch_to_deploy()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match='build another and load the checkpoint'):
        model.train()


@pytest.mark.parametrize(
    'norm_layer',
    [
        partial(nn.GroupNorm, 4),
        partial(nn.BatchNorm2d, affine=False),
        partial(nn.BatchNorm2d, track_running_stats=False),
    ],
)
def test_switch_to_deploy_wants_batch_norms(norm_layer):
    model = small(norm_layer=norm_layer)
    name = norm_layer.func.__name__
    with pytest.raises(TypeError, match=rf'only batch norms .* got {name}'):
        model.switch_to_deploy()


class NoWaiting(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: values on the host, sizes from values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        refused = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        assert not refused & set(func.tags), f'{func} waits for the device'
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('post_norm', [False, True])
@pytest.mark.parametrize('mode', ['train', 'eval', 'deploy'])
def test_no_pass_waits_for_the_device(mode, post_norm):
    """So that a CUDA graph can hold it."""
    model = small(post_norm=post_norm, drop_path_rate=0.2).train(mode == 'train')
    if mode == 'deploy':
        model.switch_to_deploy()
    images = torch.randn(2, 3, 64, 64)
    with NoWaiting():
        outs = model(images)
        if mode == 'train':
            sum(out.square().mean() for out in outs).backward()


def test_centroids_are_unit_vectors_in_the_checkpoint():
    state = small().state_dict()
    centroids = [x for name, x in state.items() if name.endswith('centroids')]
    assert [tuple(x.shape) for x in centroids] == [
        (1, 6, 8),
        (2, 6, 8),
        (2, 6, 8),
        (2, 6, 8),
    ]
    for x in centroids:
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(x.shape[:2]))
    assert not any('group_' in name for name in state)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(arch='huge'), "'tiny'.*got 'huge'"),
        (dict(arch=dict(dims=(8,))), "'depths'.*got \\['dims'\\]"),
        (dict(arch=dict(TINY, num_heads=(3, 2, 2, 4))), 'dims 8 with 3 heads'),
        (dict(arch=dict(TINY, depths=(1, 1))), "'depths': 2"),
        (dict(num_keys=0), 'num_keys must be at least 1, got 0'),
        (dict(num_groups=0), 'num_groups must be at least 1, got 0'),
        (dict(out_indices=(4,)), 'from 0 to 3, .* got \\(4,\\)'),
        (dict(out_indices=(0, 0, 1)), 'each once, got \\(0, 0, 1\\)'),
        (dict(frozen_stages=7), 'from -1 .* got 7'),
        (dict(frozen_stages=-2), 'frozen_stages must be at least -1, got -2'),
        (dict(out_indices=()), 'from 0 to 3, .* got \\(\\)'),
        (dict(in_channels=0), 'in_channels must be at least 1, got 0'),
        (dict(drop_path_rate=1.5), 'drop_path_rate must be from 0 to .* got 1.5'),
        (dict(drop_path_rate=float('nan')), 'drop_path_rate must be .* got nan'),
        (dict(arch=dict(TINY, depths=(1, 0, 1, 1))), r'depths\[1\] must be at least 1'),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DGT(**settings)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(arch=5), r'arch must be a name or a dict, got 5 \(int\)'),
        (dict(arch=dict(TINY, dims=8)), r'dims must be a sequence .* got 8 \(int\)'),
        (dict(arch=dict(TINY, stem_dims='8')), r"stem_dims must be .* got '8' \(str\)"),
        (dict(arch=dict(TINY, depths=(1, 1.5, 1, 1))), r'depths\[1\] must .* got 1.5'),
        (dict(num_groups=2.5), r'num_groups must be an integer, got 2.5 \(float\)'),
        (dict(num_keys='a'), r"num_keys must be an integer, got 'a' \(str\)"),
        (dict(num_keys=True), r'num_keys must be an integer, got True \(bool\)'),
        (dict(num_keys=None), 'num_keys must be an integer, got None'),
        (dict(out_indices=2), r'out_indices must be a sequence .* write \(2,\)'),
        (dict(out_indices='23'), 'out_indices must be a sequence'),
        (dict(out_indices=iter((0, 1))), 'out_indices must be a sequence'),
        (dict(frozen_stages=None), 'frozen_stages must be an integer, got None'),
        (dict(drop_path_rate='0.1'), r"drop_path_rate must be a number, got '0.1'"),
    ],
)
def test_settings_of_the_wrong_type(settings, message):
    with pytest.raises(TypeError, match=message):
        DGT(**settings)


@pytest.mark.parametrize('size', [(31, 64), (64, 31), (1, 1)])
def test_images_that_are_too_small(size):
    with pytest.raises(ValueError, match='at least 32 pixels a side, got'):
        small()(torch.randn(1, 3, *size))


def test_wrong_channels():
    with pytest.raises(ValueError, match=r'\(B, 3, H, W\), got \(1, 4, 64, 64\)'):
        small()(torch.randn(1, 4, 64, 64))


@pytest.mark.parametrize('strict', [True, False])
def test_weights_of_the_older_feed_forward_network_are_refused(strict):
    model = small()
    old = {key.replace('.irffn.', '.ffn.'): x for key, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r'older mmdgt.*changelog.*train anew'):
        model.load_state_dict(old, strict=strict)
