"""Groups of OpenMMLab's models: through their pipelines, by the tool and the hook."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from test_visualization import H, W, backbone, picture
from torch.utils.data import Dataset

from mmdgt.openmmlab.apis.inference import Predictor, read_image
from mmdgt.visualization import draw_groups, find_groups


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet', 'mmpretrain'])
def test_every_framework(tiny_models, scope):
    """An image of odd sides through the config's own pipeline and preprocessor."""
    config, checkpoint = tiny_models[scope]
    predictor = Predictor(Config.fromfile(config), checkpoint, 'cpu')
    view, inputs = predictor.see(picture()[..., ::-1])
    # Normalised as the configs say, RGB; Mask R-CNN's config pads to 32.
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    height, width = view.shape[:2]
    normalised = torch.from_numpy((view - np.array(mean)) / std).permute(2, 0, 1)
    torch.testing.assert_close(
        inputs[0, :, :height, :width].double(), normalised, atol=1e-4, rtol=0
    )
    sizes = {'mmseg': (H, W), 'mmdet': (71, 96), 'mmpretrain': (64, 64)}
    assert (height, width) == sizes[scope]
    groups = find_groups(predictor.model, inputs, stage=2, block=1, head=2)
    assert draw_groups(view, groups).shape == view.shape


def test_the_command(tiny_models, demo_data, call_tool, tmp_path):
    scene = next((demo_data / 'ade20k/images/validation').iterdir())
    out = tmp_path / 'groups.png'
    config, _ = tiny_models['mmseg']
    what = ('--stage', 2, '--head', 2, '--pixels', '5,60', '63,0', '--groups', 3)
    call_tool('show_groups', config, 'random', scene, '--out', out, *what)
    found = json.loads(out.with_suffix('.json').read_text())
    assert (found['stage'], found['block'], found['head']) == (2, 1, 2)
    assert found['tokens'] == sum(found['group_sizes']) == 64
    assert set(found['group_of_pixels']) == {'5,60', '63,0'}
    # A strip of captions above three rows of three panels, enlarged five times.
    assert cv2.imread(str(out)).shape == (30 + 3 * (5 * 64 + 6), 3 * (5 * 64 + 6), 3)


def test_what_is_no_picture(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'there is no file .*nothing\.png'):
        read_image(tmp_path / 'nothing.png')
    for text in ('text', ''):
        (tmp_path / 'text.png').write_text(text)
        with pytest.raises(ValueError, match=r'text\.png is damaged or no picture'):
            read_image(tmp_path / 'text.png')


MEAN, STD = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]


class Model(BaseModel):
    def __init__(self):
        super().__init__(
            dict(
                type='ImgDataPreprocessor',
                mean=MEAN,
                std=STD,
                bgr_to_rgb=True,
                pad_size_divisor=32,
            )
        )
        self.backbone = backbone()

    def forward(self, inputs, data_samples, mode):
        return [out.mean() for out in self.backbone(inputs)]


class Pictures(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {'inputs': torch.from_numpy(picture(index)).permute(2, 0, 1)}


def make_runner(work_dir, **hook):
    return Runner(
        model=Model(),
        work_dir=str(work_dir),
        val_dataloader=dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=Pictures(),
            collate_fn=dict(type='pseudo_collate'),
        ),
        val_cfg=dict(),
        val_evaluator=dict(metrics=[]),
        custom_hooks=[dict(type='GroupVisualizationHook', **hook)],
        default_scope='mmengine',
        experiment_name=work_dir.name,
    )


def test_the_hook_draws_the_first_picture_of_a_validation(tmp_path):
    runner = make_runner(tmp_path, stage=2, head=2)
    runner.val()
    (file,) = tmp_path.rglob('vis_image/*.png')
    assert file.name == 'groups_stage2_block1_head2_0.png'
    rgb = picture(0)[..., ::-1]
    padded = torch.zeros(1, 3, 64, 64)
    padded[0, :, :H, :W] = torch.from_numpy((rgb - np.array(MEAN)) / STD).permute(
        2, 0, 1
    )
    expected = draw_groups(rgb, find_groups(runner.model, padded, stage=2, head=2))
    np.testing.assert_array_equal(cv2.imread(str(file))[..., ::-1], expected)


def test_the_hook_knows_at_once_that_a_stage_has_no_groups(tmp_path):
    with pytest.raises(ValueError, match='stage 4 has GlobalAttention'):
        make_runner(tmp_path, stage=4).call_hook('before_run')
