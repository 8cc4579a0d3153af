"""Layer-wise learning rates, and what else fine-tuning asks of the backbone."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel, ExponentialMovingAverage, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmdgt.openmmlab import DGT
from mmdgt.openmmlab.engine import hooks

ARCH = dict(dims=(8, 16), depths=(1, 2), num_heads=(1, 2), stem_dims=8, post_norm=True)
# Of the parameters that start so. Three blocks, the stem and the rest: five layers.
LAYERS = {
    'backbone.stem.': 0,
    'backbone.stages.0.merge.': 1,
    'backbone.stages.0.blocks.0.': 1,
    'backbone.stages.1.merge.': 2,
    'backbone.stages.1.blocks.0.': 2,
    'backbone.stages.1.blocks.1.': 3,
    'backbone.norm1.': 4,
    'head.': 4,
}
LR, DECAY = 2.0, 0.5
SETTINGS = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=LR, weight_decay=0.1),
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        layer_decay_rate=DECAY,
        norm_decay_mult=0.0,
        custom_keys=dict(logit_scale=dict(decay_mult=0.0)),
    ),
)


class Model(BaseModel):
    def __init__(self, **backbone):
        super().__init__()
        self.backbone = DGT(ARCH, 3, 5, 6, out_indices=(1,), **backbone)
        self.head = nn.Linear(16, 2)

    def forward(self, images, mode):
        return {'loss': self.head(self.backbone(images)[0].mean((2, 3))).mean()}


def settings_by_name(model, **overrides):
    """The group of every parameter of the optimizer that a config describes."""
    cfg = ConfigDict(copy.deepcopy(SETTINGS) | overrides)
    runner = type('Runner', (), dict(model=model))()
    optimizer = Runner.build_optim_wrapper(runner, cfg).optimizer
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[group['params'][0]]: group for group in optimizer.param_groups}


def test_rates_fall_from_layer_to_layer():
    groups = settings_by_name(Model())
    for name, group in groups.items():
        (layer,) = (i for start, i in LAYERS.items() if name.startswith(start))
        assert group['lr'] == LR * DECAY ** (4 - layer), name
        # What else the config says of parameters still holds.
        is_norm = 'norm' in name or name.startswith('backbone.stem.2')
        if is_norm or 'logit_scale' in name:
            assert group['weight_decay'] == 0, name
    assert groups['head.weight']['weight_decay'] == 0.1
    assert groups.keys() == dict(Model().named_parameters()).keys()


def test_a_rate_of_a_part_is_multiplied():
    key = dict(custom_keys={'backbone.stem': dict(lr_mult=3.0)})
    groups = settings_by_name(Model(), paramwise_cfg=dict(layer_decay_rate=DECAY) | key)
    assert groups['backbone.stem.0.weight']['lr'] == 3 * LR * DECAY**4
    assert groups['backbone.stages.0.merge.0.bias']['lr'] == LR * DECAY**3


def test_a_tenth_for_the_backbone_leaves_its_norms_undecayed():
    """As Mask2Former's recipe has it, which mmsegmentation spells out norm by norm."""
    paramwise = dict(
        SETTINGS['paramwise_cfg'], layer_decay_rate=1, backbone_lr_mult=0.1
    )
    groups = settings_by_name(Model(), paramwise_cfg=paramwise)
    for name, group in groups.items():
        inside = name.startswith('backbone.')
        assert group['lr'] == pytest.approx(0.1 * LR if inside else LR), name
    norms = ('stem.2', 'stages.1.merge.1', 'stages.1.blocks.0.irffn.norm1', 'norm1')
    assert not any(groups[f'backbone.{norm}.weight']['weight_decay'] for norm in norms)


def test_frozen_stages_get_no_rate():
    groups = settings_by_name(Model(frozen_stages=1))
    learning = tuple(start for start, i in LAYERS.items() if i > 1)
    assert groups and all(name.startswith(learning) for name in groups)


def test_the_same_as_in_mmpretrain():
    pytest.importorskip('mmpretrain.engine')
    init_default_scope('mmpretrain')
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='DGT', arch=ARCH, out_indices=(1,)),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=2, in_channels=16),
        )
    )
    ours = settings_by_name(model)
    theirs = settings_by_name(
        model, constructor='LearningRateDecayOptimWrapperConstructor'
    )
    assert ours.keys() == theirs.keys()
    for name, group in theirs.items():
        assert ours[name]['lr'] == pytest.approx(group['lr']), name
        assert ours[name]['weight_decay'] == group['weight_decay'], name


def test_the_same_layers_as_in_timm():
    optim = pytest.importorskip('timm.optim')
    timm_dgt = pytest.importorskip('mmdgt.timm').DGT(
        ARCH, num_classes=2, out_indices=(1,)
    )
    groups = optim.param_groups_layer_decay(timm_dgt, layer_decay=DECAY)
    scales = {
        parameter: group['lr_scale']
        for group in groups
        for parameter in group['params']
    }
    ours = settings_by_name(Model())
    for name, parameter in timm_dgt.named_parameters():
        if not name.startswith('head.'):
            expected = ours[f'backbone.{name}']['lr'] / LR
            assert scales[parameter] == pytest.approx(expected), name


@pytest.mark.parametrize('base', ['upernet_dgt_t_demo', 'mask_rcnn_dgt_t_demo'])
def test_by_the_command_line_in_every_framework(base, repository):
    cfg = Config.fromfile(repository / 'configs' / f'{base}.py')
    cfg.merge_from_dict(
        {
            'optim_wrapper.constructor': 'LayerDecayOptimWrapperConstructor',
            'optim_wrapper.paramwise_cfg.layer_decay_rate': 0.9,
        }
    )
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    groups = settings_by_name(model, **cfg.optim_wrapper)
    lr = cfg.optim_wrapper.optimizer.lr
    rates = {name: group['lr'] / lr for name, group in groups.items()}
    assert rates['backbone.stem.0.weight'] == pytest.approx(0.9**23)
    assert rates['backbone.stages.3.blocks.1.cpe.weight'] == pytest.approx(0.9)
    heads = [name for name in rates if not name.startswith('backbone.')]
    assert heads and all(rates[name] == 1 for name in heads)


SWIN = 'mmpretrain/.mim/configs/_base_/models/swin_transformer'
UPERNET_SWIN = 'swin-{}-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512'
DROP_PATH = {
    'dgt_t_in1k': (f'{SWIN}/tiny_224.py', f'{SWIN}_v2/tiny_256.py'),
    'dgt_s_in1k': (f'{SWIN}/small_224.py', f'{SWIN}_v2/small_256.py'),
    'dgt_b_in1k': (f'{SWIN}/base_224.py', f'{SWIN}_v2/base_256.py'),
    **{
        f'upernet_dgt_{size[0]}_ade20k': (
            f'mmseg/.mim/configs/swin/{UPERNET_SWIN.format(size)}.py',
        )
        for size in ('tiny', 'small', 'base')
    },
    'mask_rcnn_dgt_t_1x_coco': (
        'mmdet/.mim/configs/swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    ),
    'mask_rcnn_dgt_s_1x_coco': (
        'mmdet/.mim/configs/swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    ),
}


@pytest.mark.parametrize('name', DROP_PATH)
def test_drop_path_is_that_of_swin(name, repository):
    ours = Config.fromfile(repository / f'configs/{name}.py').model.backbone
    for file in DROP_PATH[name]:
        package = importlib.util.find_spec(file.split('/')[0])
        swin = Config.fromfile(Path(package.origin).parents[1] / file).model.backbone
        assert ours.drop_path_rate == swin.drop_path_rate, file


class Images(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {'images': torch.randn(3, 32, 32)}


def train(tmp_path, **settings):
    loader = dict(
        batch_size=2,
        num_workers=0,
        collate_fn=dict(type='default_collate'),
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=Images(),
    )
    runner = Runner(
        model=Model(),
        work_dir=str(tmp_path),
        train_dataloader=loader,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=2),
        optim_wrapper=SETTINGS,
        custom_hooks=[dict(type='CentroidHook')],
        default_scope='mmengine',
        experiment_name=tmp_path.name,
        **settings,
    )
    runner.train()
    return runner


def test_centroids_follow_the_rate_before_decay(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(
        hooks, 'update_centroids', lambda model, keep, reseed: kept.append(keep) or {}
    )
    schedule = dict(type='LinearLR', start_factor=0.5, by_epoch=False, begin=0, end=2)
    train(tmp_path, param_scheduler=schedule)
    assert kept == pytest.approx([0.1 * 0.5 * LR, 0.1 * LR])


def test_an_average_of_buffers_would_shorten_centroids():
    """So EMAHook's default, update_buffers=False, is to stay."""
    model = Model()
    averages = {
        update: ExponentialMovingAverage(model, momentum=0.5, update_buffers=update)
        for update in (False, True)
    }
    lengths = {}
    for update, average in averages.items():
        average.update_parameters(model)
        with torch.no_grad():
            centroids = model.backbone.stages[0].blocks[0].attention.centroids
            centroids.copy_(
                nn.functional.normalize(torch.randn_like(centroids), dim=-1)
            )
        average.update_parameters(model)
        state = average.module.state_dict()
        averaged = state['backbone.stages.0.blocks.0.attention.centroids']
        lengths[update] = averaged.norm(dim=-1)
    torch.testing.assert_close(lengths[False], torch.ones_like(lengths[False]))
    assert (lengths[True] < 0.999).all()
