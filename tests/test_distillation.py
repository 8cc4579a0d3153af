"""Features of a teacher, learned without labels."""

import math
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TINY_ARCH
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmdgt.openmmlab import FeatureDistiller

PREPROCESSOR = dict(
    type='mmpretrain.ClsDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3
)
ARCH = {key: value for key, value in TINY_ARCH.items() if key != '_delete_'}
STUDENT = dict(type='DGT', arch=ARCH, num_groups=4, num_keys=8)
TEACHER = dict(
    type='mmpretrain.TIMMBackbone',
    model_name='resnet10t',
    features_only=True,
    out_indices=(1, 2, 3, 4),
)


@MODELS.register_module(force=True)
class Rows(nn.Module):
    """A map (B, 2, 3, 1) of fixed vectors, whatever the picture."""

    def __init__(self, vectors):
        super().__init__()
        self.map = nn.Parameter(torch.tensor(vectors).float().t()[None, :, :, None])

    def forward(self, images):
        return (self.map.expand(len(images), -1, -1, -1),)


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmpretrain')


def distiller(**settings):
    pytest.importorskip('timm')
    settings = dict(backbone=STUDENT, teacher=TEACHER) | settings
    return FeatureDistiller(**settings, data_preprocessor=PREPROCESSOR)


def test_the_loss_is_one_minus_the_cosine():
    ours, theirs = [[1, 0], [1, 1], [0, 2]], [[3, 0], [1, 0], [1, 0]]
    model = FeatureDistiller(
        dict(type='Rows', vectors=ours), dict(type='Rows', vectors=theirs), PREPROCESSOR
    )
    (project,) = model.projections
    nn.init.eye_(project.weight.data[:, :, 0, 0])
    nn.init.zeros_(project.bias)
    losses = model(torch.zeros(2, 3, 8, 8))
    assert losses.keys() == {'loss_0'}
    cosines = 1, math.sqrt(0.5), 0
    assert losses['loss_0'].item() == pytest.approx(1 - sum(cosines) / 3, abs=1e-6)
    # Its gradient turns the student alone.
    losses['loss_0'].backward()
    assert model.backbone.map.grad[0, :, 2, 0].abs().sum() > 0
    assert model.teacher.map.grad is None


def test_only_the_student_learns():
    model = distiller().train()
    assert model.backbone.training and not model.teacher.training
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
    sum(model(torch.randn(2, 3, 64, 64)).values()).backward()
    optimizer.step()
    changed = {
        key.split('.')[0]
        for key, value in model.state_dict().items()
        if not torch.equal(value, before[key])
    }
    assert changed == {'backbone', 'projections'}


def test_as_many_maps():
    with pytest.raises(ValueError, match='got 4 and 2: set out_indices of both'):
        distiller(teacher=TEACHER | dict(out_indices=(3, 4)))


CONFIG = """
_base_ = '{configs}/distillation/demo_student.py'
model = dict(
    backbone=dict(arch={arch}),
    teacher=dict(model_name='resnet10t', init_cfg=None),
)
train_dataloader = dict(batch_size=2, num_workers=0)
"""
TASK = """
_base_ = '{configs}/distillation/demo_comparison.py'
model = dict(
    backbone=dict(arch={arch}, init_cfg=dict(checkpoint={checkpoint!r})),
    decode_head=dict(in_channels=[16, 32, 64, 64], channels=16),
    auxiliary_head=dict(in_channels=64, channels=16),
)
"""


def test_from_pictures_to_a_segmentor(demo_data, run_tool, tmp_path):
    """The backbone of the recipe's checkpoint starts UperNet, whole."""
    from mmengine.config import Config

    from mmdgt.openmmlab.apis.inference import Predictor

    configs = REPOSITORY / 'configs'
    student, task = tmp_path / 'student.py', tmp_path / 'task.py'
    student.write_text(CONFIG.format(configs=configs, arch=TINY_ARCH))
    pictures = demo_data / 'ade20k/images/training'
    assert not list(Path(pictures).glob('*.png'))  # pictures alone, no label map
    run_tool(
        'train.py',
        *(student, '--work-dir', tmp_path / 'runs', '--cfg-options'),
        *(f'data_root={pictures}', 'train_cfg.max_iters=2'),
        'default_hooks.checkpoint.interval=2',
    )
    checkpoint = tmp_path / 'runs/iter_2.pth'
    weights = torch.load(checkpoint, weights_only=True)['state_dict']
    task.write_text(
        TASK.format(configs=configs, arch=TINY_ARCH, checkpoint=str(checkpoint))
    )
    backbone = Predictor(Config.fromfile(task), None, 'cpu').model.backbone
    backbone.init_weights()
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, weights[f'backbone.{key}']), key
