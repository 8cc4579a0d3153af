"""DGT as timm builds it, and in what builds on timm."""

import importlib.util
import re

import pytest
import torch
from conftest import REPOSITORY
from test_dgt import PUBLISHED, TINY
from torch import nn

import mmdgt
from mmdgt.models import attention

timm = pytest.importorskip('timm')
DIMS = TINY['dims']
POST_NORM = dict(TINY, post_norm=True)


def tiny(**settings):
    settings = dict(arch=TINY, num_groups=6, num_classes=5, **settings)
    return timm.create_model('dgt_tiny', **settings)


def image(channels=3, size=64):
    return torch.randn(2, channels, size, size)


@pytest.mark.parametrize('arch', PUBLISHED)
def test_the_sizes_of_table_1(arch):
    with torch.device('meta'):
        model = timm.create_model(f'dgt_{arch}')
    counted = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(counted, 2) == PUBLISHED[arch][0]
    layer = model.stages[0].blocks[0].attention
    assert (layer.num_keys, layer.centroids.shape[1]) == (98, 48)
    assert model.pretrained_cfg['input_size'] == (3, 224, 224)


def test_from_image_to_classes():
    model = tiny().eval()
    x = image()
    features = model.forward_features(x)
    before = model.forward_head(features, pre_logits=True)
    assert features.shape == (2, DIMS[-1], 2, 2)
    assert (model.num_features, model.head_hidden_size) == (DIMS[-1], 1280)
    assert before.shape == (2, 1280)
    # The paper's head, in its own words.
    head = model.head
    hidden = head.pre_logits.fc.weight @ features.mean((2, 3)).T
    hidden = nn.functional.gelu(hidden.T + head.pre_logits.fc.bias)
    torch.testing.assert_close(before, hidden)
    torch.testing.assert_close(
        model(x), hidden @ head.fc.weight.T + head.fc.bias, rtol=1e-4, atol=1e-6
    )
    assert head.fc.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_settings_arrive():
    model = tiny(
        in_chans=4,
        drop_rate=0.3,
        drop_path_rate=0.2,
        num_keys=7,
        global_pool='max',
        norm_layer='groupnorm1',
    )
    assert model(image(4)).shape == (2, 5)
    drops = [b.drop_path for stage in model.stages for b in stage.blocks]
    assert {type(drop) for drop in drops} == {timm.layers.DropPath}
    assert [d.drop_prob for d in drops] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert model.head.drop.p == 0.3
    assert model.stages[0].blocks[0].attention.num_keys == 7
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model.eval()
    pooled = model.forward_features(x := image(4)).amax((2, 3))
    expected = model.head.fc(model.head.pre_logits(pooled))
    torch.testing.assert_close(model(x), expected)


def test_without_classifier_and_pooling():
    x = image()
    assert tiny(global_pool='').eval()(x).shape == (2, 5, 2, 2)
    model = timm.create_model('dgt_tiny', arch=TINY, num_classes=0).eval()
    assert model(x).shape == (2, 1280)
    model.reset_classifier(3)
    assert (model.num_classes, model(x).shape) == (3, (2, 3))
    assert model.get_classifier() is model.head.fc
    model.reset_classifier(0, '')
    assert model(x).shape == (2, 1280, 2, 2)


def test_features_are_those_of_the_backbone_for_dense_prediction():
    model = tiny(features_only=True).eval()
    backbone = mmdgt.DGT(TINY, num_groups=6).eval()
    backbone.load_state_dict(
        {k.removeprefix('model.'): v for k, v in model.state_dict().items()}
    )
    x = image(size=96)
    assert all(map(torch.equal, model(x), backbone(x)))
    assert model.feature_info.channels() == list(DIMS)
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.model.stages[0].blocks[0].attention.num_keys == 392


@pytest.mark.parametrize('feature_cls', ['getter', 'hook', 'fx'])
def test_out_indices(feature_cls):
    settings = dict(features_only=True, feature_cls=feature_cls, out_indices=(0, 2))
    model = tiny(**settings)
    channels, reduction = model.feature_info.channels(), model.feature_info.reduction()
    assert (channels, reduction) == ([DIMS[0], DIMS[2]], [4, 16])
    out = model(image())
    shapes = [(2, c, 64 // r, 64 // r) for c, r in zip(channels, reduction)]
    assert [x.shape for x in out] == shapes
    if feature_cls == 'getter':
        sum(x.square().mean() for x in out).backward()
        unused = [name for name, p in model.named_parameters() if p.grad is None]
        assert not unused, 'built and not needed'
        assert len(model.model.stages) == 3


def test_intermediates():
    model, x = tiny(out_norm=True).eval(), image()
    last, maps = model.forward_intermediates(x)
    assert [m.shape[1] for m in maps] == list(DIMS)
    assert torch.equal(last, maps[-1])
    assert torch.equal(last, model.forward_features(x))
    only = model.forward_intermediates(x, [-1, 1], intermediates_only=True)
    assert all(map(torch.equal, only, (maps[1], maps[3])))
    early, (second,) = model.forward_intermediates(x, [1], stop_early=True)
    assert torch.equal(early, second) and torch.equal(second, maps[1])
    (normed,) = model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
    expected = nn.functional.layer_norm(maps[3].permute(0, 2, 3, 1), DIMS[-1:])
    torch.testing.assert_close(normed.permute(0, 2, 3, 1), expected)
    with pytest.raises(ValueError, match=r"must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(x, output_fmt='NLC')


def test_prune_intermediate_layers():
    model, x = tiny().eval(), image()
    _, maps = model.forward_intermediates(x)
    assert model.prune_intermediate_layers([0, -2]) == [0, 2]
    assert torch.equal(model.forward_features(x), maps[2])
    assert torch.equal(model(x), maps[2])
    assert (model.num_features, model.head_hidden_size) == (DIMS[2], DIMS[2])
    model.reset_classifier(3, 'avg')
    assert model(x).shape == (2, 3)
    whole = tiny().eval()
    assert whole.prune_intermediate_layers(1, prune_head=False) == [3]
    assert whole(x).shape == (2, 5)


def test_checkpoints_change_no_gradient_and_no_statistic():
    x, states, grads = image(), [], []
    start = tiny().state_dict()
    for enable in (False, True):
        model = tiny()
        model.load_state_dict(start)
        model.set_grad_checkpointing(enable)
        recomputed = []
        model.stages[2].blocks[1].norm2.register_forward_pre_hook(
            lambda *_, seen=recomputed: seen.append(1)
        )
        model(x).square().sum().backward()
        assert len(recomputed) == (2 if enable else 1)
        states.append(model.state_dict())
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for one, other in (states, grads):
        assert not [key for key in one if not torch.equal(one[key], other[key])]


@pytest.mark.parametrize('coarse', [False, True])
def test_groups_of_parameters(coarse):
    model = tiny(out_norm=True)
    matcher = model.group_matcher(coarse)
    patterns = matcher['blocks']
    patterns = [patterns] if coarse else [pattern for pattern, _ in patterns]
    for name, _ in model.named_parameters():
        found = [p for p in [matcher['stem'], *patterns] if re.match(p, name)]
        behind = name.startswith(('head.', 'norm') if coarse else 'head.')
        assert len(found) == (0 if behind else 1), name
    layers = timm.models.group_parameters(model, matcher)
    assert sorted(n for names in layers.values() for n in names) == sorted(
        name for name, _ in model.named_parameters()
    )
    blocks = len(TINY['depths']) if coarse else sum(TINY['depths'])
    assert len(layers) == blocks + 2  # stem and head


def test_what_does_not_decay():
    from timm.optim import create_optimizer_v2

    assert tiny().no_weight_decay() == set()
    model = timm.create_model('dgt_small', arch=POST_NORM)
    scales = {name for name, p in model.named_parameters() if p.ndim == 3}
    assert model.no_weight_decay() == scales
    assert len(scales) == sum(TINY['depths'])
    optimizer = create_optimizer_v2(model, 'adamw', weight_decay=0.05)
    parameters = dict(model.named_parameters())
    for group in optimizer.param_groups:
        if group['weight_decay']:
            members = {id(p) for p in group['params']}
            assert not [name for name in scales if id(parameters[name]) in members]


@pytest.mark.parametrize('arch', [TINY, POST_NORM])
def test_the_same_weights_in_mmpretrain(arch, tmp_path):
    registry = pytest.importorskip('mmpretrain.registry').MODELS
    head = dict(
        type='StackedLinearClsHead',
        num_classes=5,
        in_channels=DIMS[-1],
        mid_channels=[1280],
        act_cfg=dict(type='GELU'),
    )
    backbone = dict(type='DGT', arch=arch, num_keys=9, out_indices=(3,), out_norm=False)
    scope = pytest.importorskip('mmengine.registry').DefaultScope
    with scope.overwrite_default_scope('mmpretrain'):
        theirs = registry.build(
            dict(
                type='mmpretrain.ImageClassifier',
                backbone=backbone,
                neck=dict(type='mmpretrain.GlobalAveragePooling'),
                head=dict(head, type='mmpretrain.StackedLinearClsHead'),
            )
        ).eval()
    file = tmp_path / 'epoch_300.pth'
    torch.save(dict(state_dict=theirs.state_dict(), meta=dict(epoch=300)), file)
    settings = dict(arch=arch, num_keys=9, pretrained=True)
    ours = timm.create_model(
        'dgt_tiny',
        num_classes=5,
        pretrained_cfg_overlay=dict(file=str(file), num_classes=5),
        **settings,
    ).eval()
    x = image()
    assert torch.equal(ours.forward_features(x), theirs.backbone(x)[0])
    torch.testing.assert_close(ours(x), theirs(x))
    # Features for dense prediction start from the classifier's weights.
    features = timm.create_model(
        'dgt_tiny',
        features_only=True,
        pretrained_cfg_overlay=dict(file=str(file)),
        **settings,
    ).eval()
    (last,) = features.model.forward_intermediates(x, 1, intermediates_only=True)
    assert torch.equal(last, theirs.backbone(x)[0])


def test_the_model_stays_a_backbone_of_mmdgt():
    model, x = tiny(num_keys=4).eval(), image()
    few = model(x)
    model.set_num_keys(20)
    many = model(x)
    assert not torch.equal(few, many)
    model.switch_to_deploy()
    torch.testing.assert_close(model(x), many, rtol=1e-3, atol=1e-5)


@pytest.fixture
def untold(monkeypatch):
    """As if no layer had warned before, and quick to warn."""
    attention._warn_unmoved.cache_clear()
    monkeypatch.setattr(attention, 'UNMOVED_CHANGES', 2)


def train(model, optimizer, steps=4):
    for _ in range(steps):
        model(image(size=32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings('error:DG-Attention')
def test_a_hook_of_the_optimizer_moves_the_centroids(untold):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.register_step_post_hook(
        lambda *_: mmdgt.update_centroids(model, 0.1 * optimizer.param_groups[0]['lr'])
    )
    layers = [m for m in model.modules() if hasattr(m, 'centroids')]
    before = [layer.centroids.clone() for layer in layers]
    train(model, optimizer)
    assert len(layers) == sum(TINY['depths'][:-1])
    assert not any(map(torch.equal, before, (layer.centroids for layer in layers)))


def test_without_the_hook_the_loop_is_told(untold):
    model = tiny()
    with pytest.warns(UserWarning, match='Call mmdgt.update_centroids'):
        train(model, torch.optim.AdamW(model.parameters()))


def takes_a_step(model, loss):
    """Train a step; whether weights and centroids have moved."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: mmdgt.update_centroids(model, 0.01))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loss().backward()
    optimizer.step()
    changed = {
        k for k, v in model.state_dict().items() if not torch.equal(before[k], v)
    }
    assert [k for k in changed if k.endswith('centroids')]
    assert [k for k in changed if k.endswith('qkv.weight')]
    assert [k for k in changed if k.endswith('stem.0.weight')]


def test_segmentation_models_pytorch():
    smp = pytest.importorskip('segmentation_models_pytorch')
    encoder = smp.encoders.get_encoder(
        'tu-dgt_tiny', weights=None, arch=TINY, num_keys=9
    )
    assert encoder.out_channels == [3, 0, *DIMS]
    model = smp.Unet('tu-dgt_tiny', encoder_weights=None, classes=3, arch=TINY)
    assert model(image()).shape == (2, 3, 64, 64)
    takes_a_step(model, lambda: model(image()).square().mean())


def test_transformers():
    transformers = pytest.importorskip('transformers')
    config = transformers.TimmBackboneConfig(backbone='dgt_tiny', out_indices=[1, 3])
    model = transformers.TimmBackbone(config, arch=TINY)
    assert model.channels == [DIMS[1], DIMS[3]]
    maps = model(image()).feature_maps
    assert [m.shape for m in maps] == [(2, DIMS[1], 8, 8), (2, DIMS[3], 2, 2)]
    takes_a_step(
        model, lambda: sum(m.square().mean() for m in model(image()).feature_maps)
    )


def test_after_the_meta_device_the_sums_are_zero():
    from timm.models._manipulate import reinit_non_persistent_buffers

    with torch.device('meta'):
        model = tiny()
    model.to_empty(device='cpu')
    for layer in model.modules():
        if hasattr(layer, 'centroids'):
            layer.group_sums.fill_(7)
            layer.group_counts.fill_(7)
    reinit_non_persistent_buffers(model)
    assert not any(
        v.any()
        for counted in mmdgt.update_centroids(model, 0.1).values()
        for v in counted
    )


def test_the_page_runs(monkeypatch):
    """Every block of docs/timm.md, one after the other, on a small network."""
    page = (REPOSITORY / 'docs/timm.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    create = timm.create_model
    monkeypatch.setattr(
        timm, 'create_model', lambda *args, **kwargs: create(*args, arch=TINY, **kwargs)
    )
    scope = dict(images=image(), loader=[(image(), torch.tensor([1, 2]))])
    for block in blocks:
        package = re.search(r'import (segm\w+|transformers)', block)
        if not package or importlib.util.find_spec(package[1]):
            exec(block, scope)
    assert scope['scores'].shape == (2, 10)
    assert scope['channels'] == list(DIMS[1:])
    dials = {m.num_keys for m in scope['model'].modules() if hasattr(m, 'num_keys')}
    assert dials == {49}
    assert any(m.moved for m in scope['model'].modules() if hasattr(m, 'moved'))
