"""Every config builds, has the published size and takes a training step."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from torch.utils.flop_counter import FlopCounterMode

CONFIGS = Path(__file__).parents[1] / 'configs'
NAMES = sorted(path.stem for path in CONFIGS.glob('*.py'))

# Published: parameters in M; FLOPs in G of UperNet at 512 x 2048 (table 3).
UPERNET = {'t': (52.5, 954), 's': (81.9, 1074), 'b': (122.2, 1234)}
CLASSIFIERS = {'t': 24.09, 's': 51.76, 'b': 90.28}


def test_there_are_eight_configs():
    assert len(NAMES) == 8


def build(name, **overrides):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    cfg.merge_from_dict(overrides)
    init_default_scope(cfg.default_scope)
    if 'data_preprocessor' in cfg:  # as the Runner hands it over
        cfg.model.data_preprocessor = {
            'type': 'ClsDataPreprocessor',
            **cfg.data_preprocessor,
        }
    return cfg, revert_sync_batchnorm(MODELS.build(cfg.model))


def segmentation_batch(num_classes):
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64)))
        labels = torch.randint(num_classes, (1, 64, 64))
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    images = [torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in samples]
    return dict(inputs=images, data_samples=samples)


def classification_batch(num_classes):
    from mmpretrain.structures import DataSample

    samples = [DataSample().set_gt_label(i % num_classes) for i in range(2)]
    return dict(inputs=torch.rand(2, 3, 64, 64) * 255, data_samples=samples)


@pytest.mark.parametrize('name', NAMES)
def test_one_training_step(name):
    segments = name.startswith('upernet')
    # Stochastic depth may leave out a block, whose parameters then stay.
    narrow = {'model.backbone.num_keys': 10, 'model.backbone.drop_path_rate': 0.0}
    if segments:
        narrow['model.data_preprocessor.size'] = (64, 64)
        narrow['model.decode_head.channels'] = 16
    cfg, model = build(name, **narrow)
    optim_wrapper = Runner.build_optim_wrapper(
        type('Runner', (), dict(model=model))(), cfg.optim_wrapper
    )
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    make_batch = segmentation_batch if segments else classification_batch
    head = model.decode_head if segments else model.head
    model.train()
    losses = model.train_step(make_batch(head.num_classes), optim_wrapper)
    assert np.isfinite(losses['loss'].item())
    still = [k for k, p in model.named_parameters() if torch.equal(p, before[k])]
    # A bias before a batch norm has no gradient but rounding.
    assert not [key for key in still if not key.endswith('bias')]


@pytest.mark.parametrize('name', NAMES)
def test_what_users_rely_on(name):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    assert cfg.auto_scale_lr.base_batch_size > 0
    assert 'mmdgt' in cfg.custom_imports.imports
    hooks = [hook.type for hook in cfg.custom_hooks]
    assert hooks == ['CentroidHook', 'PlainCheckpointHook', 'LabelCheckHook']
    assert 'tta_model' in cfg


@pytest.mark.parametrize('variant', UPERNET)
def test_upernet_of_table_3(variant):
    _, model = build(f'upernet_dgt_{variant}_ade20k')
    params, flops = UPERNET[variant]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == params
    model = model.to('meta').eval()  # FLOPs follow from shapes; nothing is computed
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model._forward(torch.empty(1, 3, 512, 2048, device='meta'))
    # torch counts two for each multiply-add.
    assert counter.get_total_flops() / 2e9 == pytest.approx(flops, rel=0.015)


@pytest.mark.parametrize('variant', CLASSIFIERS)
def test_classifier_of_table_1(variant):
    _, model = build(f'dgt_{variant}_in1k')
    params = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(params, 2) == CLASSIFIERS[variant]


def test_multi_scale_as_in_mmsegmentation():
    cfg = Config.fromfile(CONFIGS / 'upernet_dgt_t_ade20k.py')
    scales, flips = cfg.tta_pipeline[-1].transforms[:2]
    assert [s.scale_factor for s in scales] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert [flip.prob for flip in flips] == [0.0, 1.0]


def leaves(node, path=''):
    """Every setting of a config by its path, the scopes apart."""
    if not isinstance(node, (dict, list, tuple)):
        return {path: node}
    items = node.items() if isinstance(node, dict) else enumerate(node)
    return {
        key: value
        for name, below in items
        if name != '_scope_'
        for key, value in leaves(below, f'{path}.{name}').items()
    }


def test_the_imagenet_recipe_is_that_of_swin():
    pytest.importorskip('mmpretrain')
    base = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'
    swin = Config.fromstring(f'_base_ = {base!r}', '.py')
    ours = Config.fromfile(CONFIGS / 'dgt_t_in1k.py')
    for name in ('param_scheduler', 'optim_wrapper', 'train_pipeline', 'test_pipeline'):
        theirs = leaves(swin[name])
        # What is of their model alone, and a default that we leave unsaid.
        theirs = {
            key: value
            for key, value in theirs.items()
            if '_position_' not in key and '_pos_' not in key and key[-4:] != '.eps'
        }
        assert theirs.items() <= leaves(ours[name]).items(), name
    for name in ('data_preprocessor', 'train_cfg'):
        assert leaves(swin[name]) == leaves(ours[name]), name
    assert leaves(swin.model.train_cfg) == leaves(ours.model.train_cfg)
    assert leaves(swin.model.head.loss) == leaves(ours.model.head.loss)
    # Theirs on 16 GPUs.
    base_batch_size = ours.auto_scale_lr.base_batch_size
    assert base_batch_size == 16 * swin.train_dataloader.batch_size
    assert base_batch_size == swin.auto_scale_lr.base_batch_size
    assert base_batch_size == 8 * ours.train_dataloader.batch_size


def test_the_demo_classifies_what_the_demo_data_hold(demo_data):
    cfg = Config.fromfile(CONFIGS / 'dgt_t_demo.py')
    for split in ('train', 'val'):
        folders = sorted(
            path.name for path in (demo_data / 'imagenet' / split).iterdir()
        )
        assert list(cfg.classes) == folders


def test_demo_config_names_what_the_demo_data_hold(demo_data):
    cfg = Config.fromfile(CONFIGS / 'upernet_dgt_t_demo.py')
    meta = json.loads((demo_data / 'meta.json').read_text())
    assert list(cfg.classes) == meta['classes']
    assert [list(colour) for colour in cfg.palette] == meta['palette']
