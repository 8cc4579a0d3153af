"""Recipes of today's heads and data sets train on pictures, by their own pipelines."""

import math
import shutil

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from PIL import Image
from test_configs import CONFIGS, PEERS, smaller
from test_dgt import TINY

from mmdgt.openmmlab.apis.runner import build_runner

SHAPES = ('disk', 'ring', 'triangle', 'square', 'star', 'cross')
NAMES = (*PEERS, 'upernet_dgt_t_cityscapes', 'upernet_dgt_t_voc')


def like_voc(scenes, root):
    """Scenes in the layout of PASCAL VOC 2012 with the added labels."""
    for split, labels in (
        ('train', 'SegmentationClass'),
        ('aug', 'SegmentationClassAug'),
    ):
        stems = [path.stem for path in scenes.glob('images/training/*.jpg')]
        for source, target, suffix in (
            ('images', 'JPEGImages', 'jpg'),
            ('annotations', labels, 'png'),
        ):
            (root / target).mkdir(parents=True, exist_ok=True)
            for stem in stems:
                file = scenes / source / 'training' / f'{stem}.{suffix}'
                shutil.copy(file, root / target)
        (root / 'ImageSets/Segmentation').mkdir(parents=True, exist_ok=True)
        listed = root / f'ImageSets/Segmentation/{split}.txt'
        listed.write_text('\n'.join(stems) + '\n')


def like_cityscapes(scenes, root):
    """Scenes in the layout of Cityscapes, as of one town."""
    for source, target, end in (
        ('images', 'leftImg8bit', 'leftImg8bit'),
        ('annotations', 'gtFine', 'gtFine_labelTrainIds'),
    ):
        folder = root / target / 'train' / 'town'
        folder.mkdir(parents=True)
        for file in (scenes / source / 'training').iterdir():
            Image.open(file).save(folder / f'{file.stem}_{end}.png')


@pytest.fixture
def data_of(demo_data, tmp_path):
    """The folder of a data set in the layout that a recipe expects."""

    def find(name):
        if name.endswith('coco'):
            return demo_data / 'coco'
        if name.endswith('ade20k'):
            return demo_data / 'ade20k'
        make = like_voc if name.endswith('voc') else like_cityscapes
        make(demo_data / 'ade20k', tmp_path / 'data')
        return tmp_path / 'data'

    return find


class Losses(Hook):
    """Those of all iterations."""

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append(outputs['loss'].item())


@pytest.mark.parametrize('name', NAMES)
def test_some_iterations_on_pictures(name, data_of, tools, tmp_path):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    settings, classes = smaller(cfg.model)
    settings.pop('data_preprocessor.size', None)  # that of the recipe's crops
    cfg.merge_from_dict({f'model.{key}': value for key, value in settings.items()})
    cfg.model.backbone.arch = TINY
    tools('heads').fit_heads(cfg)
    loader = cfg.train_dataloader
    loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    for dataset in loader.dataset.get('datasets', [loader.dataset]):
        dataset.update(data_root=str(data_of(name)), indices=4)
        if cfg.default_scope == 'mmdet':
            others = (f'of no scene {i}' for i in range(classes - len(SHAPES)))
            dataset.metainfo = dict(classes=(*SHAPES, *others))
    for part in ('val', 'test'):
        cfg.update(
            {f'{part}_{what}': None for what in ('dataloader', 'cfg', 'evaluator')}
        )
    by_epoch = 'max_epochs' in cfg.train_cfg
    cfg.train_cfg.update({'max_epochs': 1} if by_epoch else {'max_iters': 2})
    cfg.update(work_dir=str(tmp_path / 'run'), launcher='none', log_level='ERROR')
    runner = build_runner(cfg)
    losses = Losses()
    runner.register_hook(losses)
    runner.train()
    assert len(losses.seen) == 2 and all(map(math.isfinite, losses.seen))
