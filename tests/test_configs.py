"""Every config builds, has the published size and takes a training step."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData

from mmdgt.openmmlab.engine.flops import count_flops

CONFIGS = Path(__file__).parents[1] / 'configs'
NAMES = sorted(path.stem for path in CONFIGS.glob('*.py'))

# Published: parameters in M; FLOPs in G of UperNet at 512 x 2048 (table 3) and of
# Mask R-CNN at 800 x 1280 (table 4a).
UPERNET = {'t': (52.5, 954), 's': (81.9, 1074), 'b': (122.2, 1234)}
MASK_RCNN = {'t': (42, 272), 's': (70, 386), 'b': (108, 540)}
CLASSIFIERS = {'t': 24.09, 's': 51.76, 'b': 90.28}
INDEX = {
    model['Name']: model
    for model in yaml.safe_load((CONFIGS / 'metafile.yml').read_text())['Models']
}


def test_the_index_lists_every_config_for_real_data():
    assert INDEX.keys() == {n for n in NAMES if 'demo' not in n} and len(INDEX) == 9
    for name, model in INDEX.items():
        cfg = Config.fromfile(CONFIGS.parent / model['Config'])
        assert model['Config'] == f'configs/{name}.py'
        assert model['Metadata']['Batch Size'] == cfg.auto_scale_lr.base_batch_size
        # Nothing was trained, so there is nothing to claim.
        assert not {'Weights', 'Results'} & model.keys()


def build(name, arch=None, **overrides):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    cfg.merge_from_dict(overrides)
    if arch:
        cfg.model.backbone.arch = arch
    init_default_scope(cfg.default_scope)
    if 'data_preprocessor' in cfg:  # as the Runner hands it over
        cfg.model.data_preprocessor = {
            'type': 'ClsDataPreprocessor',
            **cfg.data_preprocessor,
        }
    return cfg, revert_sync_batchnorm(MODELS.build(cfg.model))


def segmentation_batch(num_classes):
    from mmseg.structures import SegDataSample

    images, samples = [], []
    for _ in range(2):
        labels = torch.randint(num_classes, (1, 4, 4)).repeat_interleave(16, 1)
        labels = labels.repeat_interleave(16, 2)
        sample = SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64)))
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
        images.append((labels * 255 // num_classes).byte().expand(3, -1, -1))
    return dict(inputs=images, data_samples=samples)


def classification_batch(num_classes):
    from mmpretrain.structures import DataSample

    samples = [DataSample().set_gt_label(i % num_classes) for i in range(2)]
    return dict(inputs=torch.rand(2, 3, 64, 64) * 255, data_samples=samples)


def detection_batch(num_classes):
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    samples = []
    for _ in range(2):
        sample = DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64)))
        mask = np.zeros((1, 64, 64), np.uint8)
        mask[:, 8:40, 4:44] = 1
        sample.gt_instances = InstanceData(
            bboxes=HorizontalBoxes(torch.tensor([[4.0, 8.0, 44.0, 40.0]])),
            labels=torch.randint(num_classes, (1,)),
            masks=BitmapMasks(mask, 64, 64),
        )
        sample.ignored_instances = InstanceData(
            bboxes=HorizontalBoxes(torch.zeros(0, 4)), labels=torch.zeros(0).long()
        )
        samples.append(sample)
    images = [torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in samples]
    return dict(inputs=images, data_samples=samples)


# Framework: settings that make its models small, the head that knows the classes,
# the maker of a batch.
TRAINING = {
    'mmpretrain': ({}, lambda model: model.head, classification_batch),
    'mmseg': (
        {'data_preprocessor.size': (64, 64), 'decode_head.channels': 16},
        lambda model: model.decode_head,
        segmentation_batch,
    ),
    'mmdet': (
        {'roi_head.bbox_head.fc_out_channels': 16, 'rpn_head.feat_channels': 16},
        lambda model: model.roi_head.bbox_head,
        detection_batch,
    ),
}


@pytest.mark.parametrize('name', NAMES)
def test_one_training_step(name):
    scope = Config.fromfile(CONFIGS / f'{name}.py').default_scope
    smaller, head_of, make_batch = TRAINING[scope]
    # Stochastic depth may leave out a block, whose parameters then stay.
    smaller = {'backbone.num_keys': 10, 'backbone.drop_path_rate': 0.0, **smaller}
    cfg, model = build(name, **{f'model.{key}': v for key, v in smaller.items()})
    optim_wrapper = Runner.build_optim_wrapper(
        type('Runner', (), dict(model=model))(), cfg.optim_wrapper
    )
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    model.train()
    batch = make_batch(head_of(model).num_classes)
    losses = model.train_step(batch, optim_wrapper)
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
    expected = ['CentroidHook', 'PlainCheckpointHook']
    expected += ['LabelCheckHook', 'LossCheckHook']
    assert hooks == expected + ['NumClassCheckHook'] * (cfg.default_scope == 'mmdet')
    assert 'tta_model' in cfg


def check_flops(name, model, size, published, params):
    """Against the published figure, and the index against both."""
    flops = sum(count_flops(model.to('meta').eval(), *size).values())
    assert flops / 1e9 == pytest.approx(published, rel=0.015)
    metadata = INDEX[name]['Metadata']
    assert metadata['FLOPs'] == pytest.approx(flops, rel=2e-4)
    assert metadata['Parameters'] == params * 1e6


@pytest.mark.parametrize('variant', UPERNET)
def test_upernet_of_table_3(variant):
    _, model = build(f'upernet_dgt_{variant}_ade20k')
    params, flops = UPERNET[variant]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == params
    check_flops(f'upernet_dgt_{variant}_ade20k', model, (512, 2048), flops, params)


@pytest.mark.parametrize('variant', MASK_RCNN)
def test_mask_rcnn_of_table_4(variant):
    _, model = build(f'mask_rcnn_dgt_{variant}_1x_coco')
    params, flops = MASK_RCNN[variant]
    ours = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(ours) == params
    name = f'mask_rcnn_dgt_{variant}_1x_coco'
    check_flops(name, model, (800, 1280), flops, round(ours, 1))


@pytest.mark.parametrize('variant', CLASSIFIERS)
def test_classifier_of_table_1(variant):
    _, model = build(f'dgt_{variant}_in1k')
    params = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(params, 2) == CLASSIFIERS[variant]
    metadata = INDEX[f'dgt_{variant}_in1k']['Metadata']
    assert metadata['Parameters'] == CLASSIFIERS[variant] * 1e6


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
