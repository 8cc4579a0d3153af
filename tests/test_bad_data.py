"""What is no good is served right or refused with its name."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from PIL import Image
from test_hooks import make_runner
from test_resume import make
from torch import distributed as dist
from torch import nn

from mmdgt.openmmlab import picture_files
from mmdgt.openmmlab.apis import config, inference
from mmdgt.openmmlab.engine import CheckLabelMap, LabelCheckHook, LossCheckHook


def colours():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'I;16', 'CMYK', 'turned'])
def test_pictures_of_all_kinds_come_in_colour(tmp_path, mode):
    rgb = Image.fromarray(colours())
    file, expected = tmp_path / 'x.png', (40, 60, 3)
    if mode == 'I;16':
        Image.fromarray(colours()[..., 0].astype(np.uint16) * 257).save(file)
    elif mode == 'CMYK':
        rgb.convert('CMYK').save(file := tmp_path / 'x.jpg')
    elif mode == 'turned':  # by EXIF: the rows are columns of the picture
        exif = Image.Exif()
        exif[0x0112] = 6
        rgb.save(file := tmp_path / 'x.jpg', exif=exif)
        expected = (60, 40, 3)
    else:
        rgb.convert(mode).save(file)
    image = inference.read_image(file)
    assert image.dtype == np.uint8 and image.shape == expected
    if mode == 'I;16':
        np.testing.assert_array_equal(image[..., 0], colours()[..., 0])
    if mode == 'RGBA':
        np.testing.assert_array_equal(image[..., ::-1], colours())


def test_one_pixel(tmp_path):
    cv2.imwrite(str(tmp_path / 'x.png'), colours()[:1])
    assert inference.read_image(tmp_path / 'x.png').shape == (1, 60, 3)


@pytest.mark.parametrize('end', ['.jpg', '.png'])
def test_a_torn_picture(tmp_path, end):
    content = cv2.imencode(end, colours())[1].tobytes()
    (tmp_path / f'x{end}').write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ValueError, match=rf'x\{end} is damaged or no picture'):
        inference.read_image(tmp_path / f'x{end}')


@pytest.mark.parametrize('side', [11_000, 60_000])
def test_a_picture_that_would_fill_the_memory(tmp_path, side):
    Image.new('1', (side, side // 2 + 5000)).save(tmp_path / 'bomb.png')
    with pytest.raises(ValueError, match=r'bomb\.png has .*pixels'):
        inference.read_image(tmp_path / 'bomb.png')


def results(tmp_path, labels, shape=(40, 60)):
    Image.fromarray(labels).save(tmp_path / 'labels.png')
    return dict(
        gt_seg_map=labels.astype(np.uint8),
        seg_map_path=str(tmp_path / 'labels.png'),
        img_path='x.jpg',
        ori_shape=shape,
    )


def test_label_maps(tmp_path):
    labels, check = colours()[..., 0], CheckLabelMap()
    fine = results(tmp_path, labels)
    assert check(fine) is fine
    assert check(dict(img_path='x.jpg')) == dict(img_path='x.jpg')
    assert check(results(tmp_path, labels.astype(np.uint16)))
    for wrong, message in (
        (results(tmp_path, labels, (60, 40)), r'size \(40, 60\), its picture x\.jpg'),
        (results(tmp_path, colours()), 'has 3 channels, expected one'),
        (results(tmp_path, labels.astype(np.uint16) + 256), r'16 bits with values up'),
    ):
        file = wrong['seg_map_path']
        if '16 bits' in message:
            Image.fromarray(labels.astype(np.uint16) + 256).save(file)
        else:
            Image.fromarray(labels).save(file)
        with pytest.raises(ValueError, match=rf'labels\.png .*{message}'):
            check(wrong)


def test_labels_of_no_class_in_a_cascade_of_heads():
    """As PointRend and OCRNet have them; the last decides."""
    from mmengine.structures import PixelData
    from mmseg.models import FCNHead
    from mmseg.structures import SegDataSample

    def head(num_classes):
        loss = dict(type='mmseg.CrossEntropyLoss')
        return FCNHead(
            in_channels=4, channels=4, num_classes=num_classes, loss_decode=loss
        )

    model = torch.nn.Module()
    model.decode_head = torch.nn.ModuleList([head(9), head(3)])
    runner = SimpleNamespace(model=model)
    sample = SegDataSample(
        metainfo=dict(seg_map_path='x.png', reduce_zero_label=False),
        gt_sem_seg=PixelData(data=torch.tensor([[[0, 2, 255]]])),
    )
    check = LabelCheckHook().before_train_iter
    check(runner, 0, dict(data_samples=[sample]))
    sample.gt_sem_seg.data[0, 0, 0] = 3
    with pytest.raises(ValueError, match=r'x\.png has label 3, expected 0 to 2'):
        check(runner, 0, dict(data_samples=[sample]))


@pytest.mark.parametrize('key', ['image_id', 'category_id'])
def test_coco_annotations_of_nothing(tmp_path, key):
    annotation = dict(id=7, image_id=1, category_id=1, bbox=[0, 0, 5, 5])
    content = dict(
        images=[dict(id=1)],
        categories=[dict(id=1, name='disk')],
        annotations=[dict(annotation, id=6), dict(annotation, **{key: 9})],
    )
    file = tmp_path / 'x.json'
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf'x\.json: 1 .* number 7, have an {key}'):
        config._check_categories('train_dataloader', file, ('disk',))


@pytest.mark.parametrize(
    ('box', 'area'),
    [
        ([5, 5, 0, 9], 1),
        ([5, 5, 9, 0.5], 1),
        ([60, 0, 5, 5], 25),
        ([0, -9, 5, 9], 45),
        ([5, 5, 9, 9], 0),
    ],
)
def test_boxes_that_mmdetection_leaves_out_are_told(tmp_path, box, area):
    """By its own data set, which says nothing."""
    from mmdet.datasets import CocoDataset

    picture = dict(id=1, width=60, height=40, file_name='x.png')
    whole = dict(image_id=1, category_id=1, iscrowd=0)
    content = dict(
        images=[picture],
        categories=[dict(id=1, name='disk')],
        annotations=[
            dict(whole, id=6, bbox=[-3, 30, 9, 20], area=9),
            dict(whole, id=7, bbox=box, area=area),
        ],
    )
    file = tmp_path / 'x.json'
    file.write_text(json.dumps(content))
    dataset = CocoDataset(
        ann_file=str(file),
        data_prefix=dict(img=''),
        metainfo=dict(classes=('disk',)),
    )
    assert len(dataset.get_data_info(0)['instances']) == 1
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, 'print_log', lambda text, **_: told.append(text))
        config._check_categories('train_dataloader', file, ('disk',))
        content['annotations'].pop()
        file.write_text(json.dumps(content))
        config._check_categories('train_dataloader', file, ('disk',))
    (text,) = told
    assert 'x.json: 1 (7) of its 2 annotations are left out' in text


class Files(list):
    """A data set that only names its pictures."""

    def get_data_info(self, index):
        return dict(img_path=str(self[index]))


@pytest.fixture
def pictures(tmp_path):
    for i in range(4):
        end = ('.jpg', '.png')[i % 2]
        cv2.imwrite(str(tmp_path / f'{i}{end}'), colours())
    # As some cameras append, and phones, which append a film.
    for name, length in (('0.jpg', 1000), ('1.png', 9000), ('2.jpg', 9000)):
        with open(tmp_path / name, 'ab') as file:
            file.write(bytes(length))
    return Files(sorted(tmp_path.glob('*.*')))


@pytest.mark.parametrize(
    ('number', 'length', 'message'),
    [
        (0, 0, r'0\.jpg is damaged or no picture: it is empty'),
        (2, 900, r'2\.jpg is damaged or no picture: .*truncated'),
        (3, 900, r'3\.png is damaged or no picture: .*truncated'),
        (3, 20, r'3\.png is damaged or no picture'),
        (1, None, r'there is no file .*1\.png'),
    ],
)
def test_training_pictures_are_looked_at_before_the_start(
    pictures, number, length, message
):
    assert picture_files.check_pictures(pictures) == 4
    if length is None:
        pictures[number].unlink()
    else:
        pictures[number].write_bytes(pictures[number].read_bytes()[:length])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        picture_files.check_pictures(pictures)


def test_the_look_takes_no_longer_than_allowed(pictures, monkeypatch):
    monkeypatch.setattr(picture_files, 'READERS', 1)
    assert picture_files.check_pictures(Files(pictures * 100), seconds=0) == 64
    assert picture_files.check_pictures(Files(['s3://bucket/x.jpg'])) == 0
    assert picture_files.check_pictures([1, 2]) == 0


def test_training_does_not_start_with_a_cut_off_picture(pictures):
    class Pictures(Files, torch.utils.data.Dataset):
        pass

    pictures[1].write_bytes(pictures[1].read_bytes()[:900])
    runner = make(pictures[0].parent / 'run')
    runner._train_dataloader['dataset'] = Pictures(pictures)
    with pytest.raises(ValueError, match=r'1\.png is damaged'):
        runner.train()


class Break(Hook):
    """Spoils something in the third iteration."""

    def __init__(self, what):
        self.what = what

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter != 2:
            return
        if self.what == 'picture':
            data_batch['images'][1, 0, 5, 5] = float('inf')
        if self.what == 'weight':
            runner.model.backbone.stem[0].weight.data[0] = float('nan')
        if self.what == 'module':
            layer = runner.model.backbone.stages[1].blocks[0].irffn
            layer.register_forward_hook(lambda *args: args[2] / 0)


@pytest.mark.parametrize(
    ('what', 'message'),
    [
        ('picture', 'the pictures of the batch are not'),
        ('weight', r'weights are not: 1 \(backbone\.stem\.0\.weight\)'),
        ('module', r'first output that is not is of backbone\.stages\.1\.blocks\.0\.i'),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_iteration(tmp_path, what, message):
    runner = make_runner(tmp_path)
    runner.register_hook(LossCheckHook())
    runner.register_hook(Break(what))
    with pytest.raises(FloatingPointError, match=f'iteration 3: loss .*{message}'):
        runner.train()
    if what != 'weight':
        state = runner.model.state_dict()
        saved = torch.load(tmp_path / 'iter_2.pth', weights_only=True)['state_dict']
        for name, _ in runner.model.named_parameters():
            assert torch.equal(state[name], saved[name]), name


class Exchanging(nn.Module):
    """Waits for the other processes in its pass, as SyncBN does."""

    passes = 0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.inner = nn.Identity()

    def forward(self, x, mode):
        self.passes += 1
        dist.all_reduce(torch.zeros(1))
        bad = dist.get_rank() == 1  # in one of them alone
        return {'loss': self.inner(self.weight / 0 if bad else self.weight) * x.sum()}


def lose_on_one_rank():
    """What a process says of its loss, and how often it went through the model."""
    runner = SimpleNamespace(model=Exchanging(), iter=0)
    LossCheckHook().before_train(runner)
    try:
        runner.model(torch.ones(2), mode='loss')
    except FloatingPointError as error:
        return str(error), runner.model.passes
    return None, runner.model.passes


def test_a_loss_that_is_not_finite_on_one_of_two_ranks(on_two_ranks):
    """The other is not there to repeat the pass with."""
    (fine, once), (told, passes) = on_two_ranks(lose_on_one_rank)
    assert (fine, once, passes) == (None, 1, 1)
    assert 'iteration 1: loss is not finite' in told
    assert 'a run in one process names the module' in told
