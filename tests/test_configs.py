"""Every config builds, has the published size and takes a training step."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData

from mmdgt.openmmlab.engine.flops import count_flops

CONFIGS = Path(__file__).parents[1] / 'configs'
README = CONFIGS.parent / 'README.md'
NAMES = sorted(path.stem for path in CONFIGS.glob('*.py'))

# Published: parameters in M; FLOPs in G of UperNet at 512 x 2048 (table 3) and of
# Mask R-CNN at 800 x 1280 (table 4a), of classifiers at 224 x 224 (table 1).
UPERNET = {'t': (52.5, 954), 's': (81.9, 1074), 'b': (122.2, 1234)}
MASK_RCNN = {'t': (42, 272), 's': (70, 386), 'b': (108, 540)}
CLASSIFIERS = {'t': (24.09, 4.35), 's': (51.76, 9.41), 'b': (90.28, 16.4)}
INDEX = {
    model['Name']: model
    for model in yaml.safe_load((CONFIGS / 'metafile.yml').read_text())['Models']
}


def test_the_index_lists_every_config_for_real_data():
    assert INDEX.keys() == {n for n in NAMES if 'demo' not in n} and len(INDEX) == 17
    for name, model in INDEX.items():
        cfg = Config.fromfile(CONFIGS.parent / model['Config'])
        assert model['Config'] == f'configs/{name}.py'
        assert model['Metadata']['Batch Size'] == cfg.auto_scale_lr.base_batch_size
        # Nothing was trained, so there is nothing to claim.
        assert not {'Weights', 'Results'} & model.keys()


def test_the_table_of_the_readme_names_every_config():
    """A row may stand for three sizes; the ablations have a page of their own."""
    rows = re.findall(r'^\| `([\w{},]+)\.py` \|', README.read_text(), re.MULTILINE)
    named = [
        row.replace('{t,s,b}', size)
        for row in rows
        for size in ('tsb' if '{t,s,b}' in row else 't')
    ]
    assert sorted(named) == [name for name in NAMES if name != 'dgt_ablation_demo']


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
        sample = DetDataSample(
            metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1, 1))
        )
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


# Framework: the maker of a batch.
BATCHES = {
    'mmpretrain': classification_batch,
    'mmseg': segmentation_batch,
    'mmdet': detection_batch,
}


def smaller(model):
    """Settings that make a model small, and the number of its classes."""
    if model.type == 'ImageClassifier':
        return {}, model.head.num_classes
    if model.type == 'EncoderDecoder':
        settings = {'data_preprocessor.size': (64, 64)}
        if 'channels' in model.decode_head:
            settings['decode_head.channels'] = 16
        else:
            settings |= layers_of_mask2former('decode_head')
            settings['decode_head.train_cfg.num_points'] = 64
        return settings, model.decode_head.num_classes
    if model.type == 'Mask2Former':
        settings = layers_of_mask2former('panoptic_head')
        settings['data_preprocessor.batch_augments'] = None
        settings['train_cfg.num_points'] = 64
        return settings, model.panoptic_head.num_things_classes
    if model.type == 'RetinaNet':
        return {'bbox_head.feat_channels': 16}, model.bbox_head.num_classes
    settings = {'rpn_head.feat_channels': 16}
    if model.type == 'CascadeRCNN':
        settings['train_cfg.rpn_proposal.max_per_img'] = 20
        settings['test_cfg.rpn.max_per_img'] = 20
        for i in range(3):
            settings[f'roi_head.bbox_head.{i}.conv_out_channels'] = 16
            settings[f'roi_head.bbox_head.{i}.fc_out_channels'] = 16
            settings[f'train_cfg.rcnn.{i}.sampler.num'] = 16
    else:
        settings['roi_head.bbox_head.fc_out_channels'] = 16
    return settings, model.roi_head.mask_head.num_classes


def layers_of_mask2former(head):
    return {
        f'{head}.pixel_decoder.encoder.num_layers': 1,
        f'{head}.transformer_decoder.num_layers': 2,
    }


@pytest.mark.parametrize('name', NAMES)
def test_one_training_step(name):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    settings, num_classes = smaller(cfg.model)
    # Stochastic depth may leave out a block, whose parameters then stay.
    settings = {'backbone.num_keys': 10, 'backbone.drop_path_rate': 0.0, **settings}
    cfg, model = build(name, **{f'model.{key}': v for key, v in settings.items()})
    optim_wrapper = Runner.build_optim_wrapper(
        type('Runner', (), dict(model=model))(), cfg.optim_wrapper
    )
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    model.train()
    losses = model.train_step(BATCHES[cfg.default_scope](num_classes), optim_wrapper)
    assert np.isfinite(losses['loss'].item())
    still = [k for k, p in model.named_parameters() if torch.equal(p, before[k])]
    # A bias before a batch norm has no gradient but rounding.
    assert not [key for key in still if not key.endswith('bias')]
    if name in PEERS:
        check_prediction(model.eval(), BATCHES[cfg.default_scope](num_classes))


def check_prediction(model, batch):
    """A class for every pixel, or boxes, classes and masks in the picture."""
    with torch.no_grad():
        found, _ = model.test_step(batch)
    if 'pred_sem_seg' in found:
        assert found.pred_sem_seg.data.shape == (1, 64, 64)
        return
    assert found.pred_instances.bboxes.shape[1:] == (4,)
    if model.with_mask or hasattr(model, 'panoptic_head'):
        assert found.pred_instances.masks.shape[1:] == (64, 64)


@pytest.mark.parametrize('name', NAMES)
def test_what_users_rely_on(name):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    assert cfg.auto_scale_lr.base_batch_size > 0
    assert 'mmdgt' in cfg.custom_imports.imports
    for needed in cfg.custom_imports.imports:
        importlib.import_module(needed)
    hooks = [hook.type for hook in cfg.custom_hooks]
    expected = ['CentroidHook', 'PlainCheckpointHook']
    expected += ['LabelCheckHook', 'LossCheckHook']
    assert hooks == expected + ['NumClassCheckHook'] * (cfg.default_scope == 'mmdet')
    assert 'tta_model' in cfg


def check_flops(name, model, size, published):
    """Against the published figure, and the index against both."""
    params = sum(p.numel() for p in model.parameters())
    flops = sum(count_flops(model.to('meta').eval(), *size).values())
    assert flops / 1e9 == pytest.approx(published, rel=0.015)
    metadata = INDEX[name]['Metadata']
    assert metadata['FLOPs'] == pytest.approx(flops, abs=5e5)
    assert metadata['Parameters'] == pytest.approx(params, abs=5e3)


def test_index_and_readme_follow_from_the_configs_by_a_command(tools):
    tool = tools('index_models')
    index, readme = ((CONFIGS / 'metafile.yml').read_text(), README.read_text())
    models = list(INDEX.values())
    assert tool.with_models(index, models) == index
    assert tool.with_sizes(readme, models) == readme
    for name in ('retinanet_dgt_t_1x_coco', 'mask2former_dgt_t_ade20k'):
        cfg = Config.fromfile(CONFIGS / f'{name}.py')
        assert tool.entry(name, cfg) == INDEX[name]
    assert 'FLOPs' not in INDEX[name]['Metadata']
    more = [*models, dict(INDEX[name], Name='of another size')]
    assert yaml.safe_load(tool.with_models(index, more))['Models'] == more
    with pytest.raises(ValueError, match='expected a row of sizes "UperNet DGT-B"'):
        tool.with_sizes(readme.replace('UperNet DGT-B', 'another'), models)


@pytest.mark.parametrize('variant', UPERNET)
def test_upernet_of_table_3(variant):
    _, model = build(f'upernet_dgt_{variant}_ade20k')
    params, flops = UPERNET[variant]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == params
    check_flops(f'upernet_dgt_{variant}_ade20k', model, (512, 2048), flops)


@pytest.mark.parametrize('variant', MASK_RCNN)
def test_mask_rcnn_of_table_4(variant):
    _, model = build(f'mask_rcnn_dgt_{variant}_1x_coco')
    params, flops = MASK_RCNN[variant]
    ours = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(ours) == params
    name = f'mask_rcnn_dgt_{variant}_1x_coco'
    check_flops(name, model, (800, 1280), flops)


@pytest.mark.parametrize('variant', CLASSIFIERS)
def test_classifier_of_table_1(variant):
    _, model = build(f'dgt_{variant}_in1k')
    params, published = CLASSIFIERS[variant]
    counted = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(counted, 2) == params
    name = f'dgt_{variant}_in1k'
    check_flops(name, model, (224, 224), published)


# Published parameters (M) of the same model with Swin-T: by Mask2Former for itself; by
# SwinTransformer/Swin-Transformer-Object-Detection for the cascade; by Twins for
# RetinaNet (so too cheerss/CrossFormer) and Semantic FPN.
WITH_SWIN = {
    'mask2former_dgt_t_ade20k': 47,
    'mask2former_dgt_t_coco': 47,
    'cascade_mask_rcnn_dgt_t_3x_coco': 86,
    'retinanet_dgt_t_1x_coco': 38.5,
    'fpn_dgt_t_ade20k': 31.9,
}


@pytest.mark.parametrize('name', WITH_SWIN)
def test_with_swin_the_size_is_the_published_one(name, tools):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    out_indices = cfg.model.backbone.get('out_indices', (0, 1, 2, 3))
    swin = dict(type='mmpretrain.SwinTransformer', arch='tiny', out_indices=out_indices)
    cfg.model.backbone = swin
    tools('heads').fit_heads(cfg)
    model = MODELS.build(cfg.model)
    params = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(params, isinstance(WITH_SWIN[name], float)) == WITH_SWIN[name]
    _, ours = build(name)
    params = sum(p.numel() for p in ours.parameters())
    assert INDEX[name]['Metadata']['Parameters'] == round(params, -4)


# One picture of 512 x 2048 or 800 x 1280. Those of tables 3 and 4 are checked there.
COUNTED = (
    'fpn_dgt_t_ade20k',
    'upernet_dgt_t_cityscapes',
    'upernet_dgt_t_voc',
    'mask_rcnn_dgt_t_3x_coco',
    'cascade_mask_rcnn_dgt_t_3x_coco',
    'retinanet_dgt_t_1x_coco',
)


@pytest.mark.parametrize('name', COUNTED)
def test_the_index_has_the_flops(name):
    cfg, model = build(name)
    size = (512, 2048) if cfg.default_scope == 'mmseg' else (800, 1280)
    flops = sum(count_flops(model.to('meta').eval(), *size).values())
    assert INDEX[name]['Metadata']['FLOPs'] == pytest.approx(flops, abs=5e5)


def test_a_cascade_counts_all_its_heads():
    """Swin's authors publish 745 G with Swin-T, and 267 G for its Mask R-CNN."""
    cascade, plain = (
        INDEX[name]['Metadata']['FLOPs'] / 1e9
        for name in ('cascade_mask_rcnn_dgt_t_3x_coco', 'mask_rcnn_dgt_t_3x_coco')
    )
    assert cascade - plain == pytest.approx(745 - 267, abs=1)


@pytest.mark.parametrize(
    ('name', 'same'),
    [
        ('upernet_dgt_t_cityscapes', 'upernet_dgt_t_ade20k'),
        ('upernet_dgt_t_voc', 'upernet_dgt_t_ade20k'),
        ('mask_rcnn_dgt_t_3x_coco', 'mask_rcnn_dgt_t_1x_coco'),
    ],
)
def test_sizes_of_the_same_models_elsewhere(name, same):
    """The classes apart, of which each costs a weight a channel and a bias."""
    ours, theirs = (Config.fromfile(CONFIGS / f'{n}.py').model for n in (name, same))
    fewer = 0
    for head in ('decode_head', 'auxiliary_head'):
        if head in ours:
            classes = theirs[head].num_classes - ours[head].num_classes
            fewer += classes * (ours[head].channels + 1)
            theirs[head].num_classes = ours[head].num_classes
    if fewer:
        theirs.data_preprocessor.size = ours.data_preprocessor.size
    assert leaves(ours) == leaves(theirs)
    expected = INDEX[same]['Metadata']['Parameters'] - fewer
    assert INDEX[name]['Metadata']['Parameters'] == pytest.approx(expected, abs=1e4)


def peer(path):
    """A config that a framework of OpenMMLab brings along."""
    package, _, file = path.partition('/')
    origin = importlib.util.find_spec(package).origin
    return Config.fromfile(Path(origin).parent / '.mim/configs' / file)


# The config of a peer with the same head, and what ours has of it.
PEERS = {
    'mask2former_dgt_t_ade20k': (
        'mmseg/mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py',
        'model.decode_head optim_wrapper.optimizer optim_wrapper.clip_grad'
        ' param_scheduler train_pipeline',
    ),
    'mask2former_dgt_t_coco': (
        'mmdet/mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py',
        'model.data_preprocessor model.panoptic_head model.panoptic_fusion_head'
        ' model.train_cfg model.test_cfg optim_wrapper.optimizer'
        ' optim_wrapper.clip_grad train_pipeline',
    ),
    'mask_rcnn_dgt_t_3x_coco': (
        'mmdet/swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py',
        'optim_wrapper.optimizer param_scheduler train_cfg train_pipeline',
    ),
    'cascade_mask_rcnn_dgt_t_3x_coco': (
        'mmdet/convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_'
        'amp-ms-crop-3x_coco.py',
        'model.roi_head.bbox_head model.train_cfg.rcnn model.train_cfg.rpn_proposal'
        ' param_scheduler train_cfg train_pipeline',
    ),
    'retinanet_dgt_t_1x_coco': (
        'mmdet/swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py',
        'model.neck model.bbox_head model.train_cfg model.test_cfg train_cfg',
    ),
    'fpn_dgt_t_ade20k': (
        'mmseg/twins/twins_pcpvt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512.py',
        'model.neck model.decode_head optim_wrapper.optimizer.lr'
        ' optim_wrapper.optimizer.weight_decay train_cfg train_pipeline',
    ),
}


def part_of(cfg, path):
    """The settings of a part, but for those that are the backbone's and our checks."""
    for name in path.split('.'):
        cfg = cfg[name]
    if path == 'train_pipeline':
        cfg = [step for step in cfg if step['type'] != 'CheckLabelMap']
    return {
        key: value.removeprefix('mmdet.') if isinstance(value, str) else value
        for key, value in leaves(cfg).items()
        if not key.startswith('.in_channels.')
    }


@pytest.mark.parametrize('name', PEERS)
def test_head_and_recipe_are_those_of_the_peers(name):
    """What we say they say too; what else they say are defaults."""
    path, parts = PEERS[name]
    ours, theirs = Config.fromfile(CONFIGS / f'{name}.py'), peer(path)
    for part in parts.split():
        assert part_of(ours, part).items() <= part_of(theirs, part).items(), part


def test_the_backbone_of_the_readme_in_a_config_of_mmsegmentation(tmp_path):
    (block,) = re.findall(
        r'^```python\n(custom_imports.+?)^```', README.read_text(), re.M | re.S
    )
    stock = peer('mmseg/upernet/upernet_r50_4xb4-160k_ade20k-512x512.py').filename
    (tmp_path / 'mine.py').write_text(f'_base_ = {str(stock)!r}\n{block}')
    cfg = Config.fromfile(tmp_path / 'mine.py')
    cfg.model.data_preprocessor.size = (64, 64)
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    assert type(model.backbone).__name__ == 'DGT'
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    inputs = segmentation_batch(cfg.model.decode_head.num_classes)
    data = model.data_preprocessor(inputs, training=True)
    assert np.isfinite(sum(x.item() for x in model(**data, mode='loss').values()))


def pipelines(settings):
    """All pipelines in the settings of a data set, which may hold others."""
    if isinstance(settings, dict):
        if 'pipeline' in settings:
            yield settings['pipeline']
        for value in settings.values():
            yield from pipelines(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from pipelines(value)


@pytest.mark.parametrize('name', NAMES)
def test_pipelines_build(name):
    """A step takes no argument that is another's."""
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    init_default_scope(cfg.default_scope)
    found = [
        pipeline
        for which in ('train', 'val', 'test')
        for pipeline in pipelines(cfg[f'{which}_dataloader']['dataset'])
    ]
    assert len(found) >= 3
    for pipeline in [*found, cfg.get('tta_pipeline', [])]:
        Compose(pipeline)


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
