"""Predictions without a Runner: the frameworks' inferencers and tools/infer.py."""

import re

import cv2
import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import TRANSFORMS

from mmdgt.openmmlab.apis.inference import Predictor


def picture():
    return np.random.default_rng(0).integers(0, 256, (61, 75, 3), dtype=np.uint8)


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp('pictures') / 'picture.png'
    cv2.imwrite(str(file), picture())
    return str(file)


@pytest.fixture
def predictor(tiny_models):
    """Make the predictor of a framework, which becomes the default scope."""
    return lambda scope: Predictor(
        Config.fromfile(tiny_models[scope][0]), tiny_models[scope][1], 'cpu'
    )


def test_as_the_inferencer_of_mmsegmentation(tiny_models, predictor, file):
    from mmseg.apis import MMSegInferencer

    ours = predictor('mmseg')
    inferencer = MMSegInferencer(
        *tiny_models['mmseg'], device='cpu', show_progress=False
    )
    found = inferencer(file, return_vis=True)
    labels = ours.predict(picture()).pred_sem_seg.data[0].numpy()
    np.testing.assert_array_equal(found['predictions'], labels)
    drawn = mmcv.bgr2rgb(ours.draw(picture()))
    np.testing.assert_array_equal(found['visualization'], drawn)


def test_classes_in_parts_are_those_of_all_at_once(predictor, monkeypatch):
    """Of equal scores the lowest class wins, over parts too."""
    from mmdgt.openmmlab.apis import segmentation

    ours = predictor('mmseg')
    with torch.no_grad():
        for values in ours.model.decode_head.conv_seg.parameters():
            values[3] = values[6] = values[1]
    monkeypatch.setattr(segmentation, 'CLASSES', 2)
    ours.pipeline.transforms.insert(
        -1, TRANSFORMS.build(dict(type='Resize', scale=(99, 99), keep_ratio=True))
    )
    assert segmentation.scores_classes_apart(ours.model)
    found, expected = ours.find(picture()), ours.predict(picture())
    assert found.pred_sem_seg.shape == (61, 75)
    assert torch.equal(found.pred_sem_seg.data, expected.pred_sem_seg.data)
    assert len(found.pred_sem_seg.data.unique()) > 1


def test_whose_classes_need_all_scores(predictor):
    from mmdgt.openmmlab.apis.segmentation import scores_classes_apart

    model = predictor('mmseg').model
    model.test_cfg = dict(mode='slide')
    assert not scores_classes_apart(model)
    model.test_cfg = dict(mode='whole')
    model.decode_head.__class__ = type(
        'Own', (type(model.decode_head),), dict(predict=lambda *args: None)
    )
    assert not scores_classes_apart(model)


def of_two_classes(model):
    model.decode_head.update(num_classes=2, out_channels=1, threshold=0.5)


def of_a_cascade(model):
    model.update(type='CascadeEncoderDecoder', num_stages=2)
    context = dict(model.auxiliary_head, type='OCRHead', ocr_channels=8)
    for key in ('num_convs', 'concat_input'):
        context.pop(key)
    model.decode_head = [model.auxiliary_head, context]
    model.auxiliary_head = None


@pytest.mark.parametrize('change', [of_two_classes, of_a_cascade])
def test_what_is_found_is_what_is_predicted(tiny_models, change):
    """Also by heads with one score for two classes, and by several in turn."""
    cfg = Config.fromfile(tiny_models['mmseg'][0])
    change(cfg.model)
    ours = Predictor(cfg, None, 'cpu')
    scores = ours.predict(picture()).seg_logits.data
    single = len(scores) == 1  # given as a probability
    scores = scores.logit() if single else scores
    *_, last = (m for m in ours.model.decode_head.modules() if hasattr(m, 'conv_seg'))
    # To win about as often as the others.
    last.conv_seg.bias.data -= scores.flatten(1).median(dim=1).values
    expected = ours.predict(picture())
    labels = ours.find(picture()).pred_sem_seg.data
    assert torch.equal(labels, expected.pred_sem_seg.data)
    if single:
        assert torch.equal(labels, (expected.seg_logits.data > 0.5).to(labels))
    assert len(labels.unique()) > 1
    assert ours.draw(picture()).shape == picture().shape


def test_as_the_inferencer_of_mmdetection(tiny_models, predictor, file):
    from mmdet.apis import DetInferencer

    ours = predictor('mmdet')
    inferencer = DetInferencer(*tiny_models['mmdet'], device='cpu', show_progress=False)
    found = inferencer(file, return_vis=True)
    instances = ours.predict(picture()).pred_instances
    assert len(instances) > 0
    (theirs,) = found['predictions']
    np.testing.assert_array_equal(theirs['scores'], instances.scores)
    np.testing.assert_array_equal(theirs['bboxes'], instances.bboxes)
    drawn = mmcv.bgr2rgb(ours.draw(picture()))
    np.testing.assert_array_equal(found['visualization'][0], drawn)


def test_as_the_inferencer_of_mmpretrain(tiny_models, predictor, file, tmp_path):
    from mmpretrain import ImageClassificationInferencer

    ours = predictor('mmpretrain')
    inferencer = ImageClassificationInferencer(*tiny_models['mmpretrain'], device='cpu')
    (found,) = inferencer(file, show_dir=tmp_path)
    sample = ours.predict(picture())
    np.testing.assert_array_equal(found['pred_scores'], sample.pred_score)
    assert found['pred_class'] == ours.metainfo['classes'][sample.pred_label.item()]
    drawn = cv2.imread(str(tmp_path / 'picture.png'))
    np.testing.assert_array_equal(drawn, ours.draw(picture()))


def test_a_checkpoint_of_another_model(tiny_models, tmp_path):
    cfg = Config.fromfile(tiny_models['mmseg'][0])
    with pytest.raises(ValueError, match=r'weights of the model that.*missing: 90'):
        Predictor(cfg, tiny_models['mmpretrain'][1], 'cpu')
    with pytest.raises(OSError, match=r'nothing\.pth'):
        Predictor(cfg, str(tmp_path / 'nothing.pth'), 'cpu')


def test_infer_a_folder(tiny_models, predictor, call_tool, tmp_path, capsys):
    folder, out = tmp_path / 'in', tmp_path / 'new' / 'out'
    folder.mkdir()
    for name in ('one.png', 'two.bmp'):
        cv2.imwrite(str(folder / name), picture())
    (folder / 'notes.txt').write_text('no picture')
    call_tool('infer', *tiny_models['mmseg'], folder, '--out', out)
    assert '1 other files are left out' in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ['one.png', 'two.bmp']
    drawn = predictor('mmseg').draw(picture())
    for path in out.iterdir():
        np.testing.assert_array_equal(cv2.imread(str(path)), drawn)


def clip(file, levels, size=(80, 64)):
    codec = cv2.VideoWriter_fourcc(*'MJPG')
    writer = cv2.VideoWriter(str(file), codec, 5, size)
    for level in levels:
        writer.write(np.full((*size[::-1], 3), level, np.uint8))
    writer.release()


def test_a_video_that_is_not_written_whole(
    tiny_models, call_tool, tmp_path, monkeypatch
):
    """OpenCV says nothing when the disk is full."""
    clip(tmp_path / 'clip.avi', (40, 120, 200))

    real = cv2.VideoWriter

    class Full:  # no subclass: Python's garbage collector fails on those of OpenCV
        fourcc = real.fourcc
        full = False

        def __init__(self, *args):
            self.writer = real(*args)
            self.isOpened, self.release = self.writer.isOpened, self.writer.release

        def write(self, frame):
            if not self.full:
                self.writer.write(frame)
            self.full = True

    monkeypatch.setattr(cv2, 'VideoWriter', Full)
    out = tmp_path / 'out'
    with pytest.raises(OSError, match=r'1 of 3 frames could be written'):
        call_tool('infer', *tiny_models['mmseg'], tmp_path / 'clip.avi', '--out', out)
    assert not list(out.iterdir())


def test_infer_a_video(tiny_models, predictor, call_tool, tmp_path):
    clip(tmp_path / 'clip.avi', (40, 120, 200), size=(size := (80, 64)))
    out = tmp_path / 'out'
    call_tool('infer', *tiny_models['mmseg'], tmp_path / 'clip.avi', '--out', out)
    video, original = (
        mmcv.VideoReader(str(path))
        for path in (out / 'clip.mp4', tmp_path / 'clip.avi')
    )
    assert (len(video), video.fps, video.resolution) == (3, 5, size)
    ours = predictor('mmseg')
    for frame, read in zip(video, original):  # up to the loss of the codec
        assert np.abs(frame - ours.draw(read).astype(float)).mean() < 8


@pytest.mark.parametrize(
    ('name', 'error', 'message'),
    [
        ('nothing', SystemExit, 'there is no file or folder'),
        ('empty', FileNotFoundError, 'expected pictures in .* among its 0 files'),
        ('text.mp4', ValueError, 'neither a picture nor a video'),
        ('torn.png', ValueError, 'damaged or no picture'),
        ('taken', SystemExit, 'another folder than that of the input'),
    ],
)
def test_infer_what_is_no_input(
    tiny_models, call_tool, tmp_path, capsys, name, error, message
):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'text.mp4').write_text('no video')
    whole = cv2.imencode('.png', picture())[1].tobytes()
    (tmp_path / 'torn.png').write_bytes(whole[:60])
    out = tmp_path / ('taken' if name == 'taken' else 'out')
    with pytest.raises(error) as raised:
        call_tool('infer', *tiny_models['mmseg'], tmp_path / name, '--out', out)
    assert re.search(message, str(raised.value) + capsys.readouterr().err)
