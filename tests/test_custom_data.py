"""The examples of docs/custom_data.md, run as they stand on data as they describe."""

import json
import re

import cv2
import numpy as np
import pytest
from conftest import REPOSITORY

EXAMPLES = re.findall(
    r'```python\n# (\w+)\.py\n(.*?)```',
    (REPOSITORY / 'docs/custom_data.md').read_text(),
    re.DOTALL,
)
SMALL = {
    'roads': ('train_cfg.max_iters=1', 'train_cfg.val_interval=1', 'crop_size=(64,64)'),
    'fruit': ('train_cfg.max_epochs=1',),
}


def rectangle(rng):
    """Corners x0, y0, x1, y1 in a picture of 64 pixels."""
    x, y = rng.integers(4, 20, 2)
    return [int(x), int(y), int(x + 36), int(y + 30)]


def write_roads(root):
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for kind in ('images', 'labels'):
            (root / kind / split).mkdir(parents=True)
        for number in range(2):
            labels = rng.integers(0, 3, (64, 64), dtype=np.uint8)
            labels[:3] = 255
            image = 80 * np.stack(3 * [labels % 3], 2)
            cv2.imwrite(str(root / f'images/{split}/{number}.jpg'), image)
            cv2.imwrite(str(root / f'labels/{split}/{number}.png'), labels)


def write_fruit(root):
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(2):
            x0, y0, x1, y1 = rectangle(rng)
            image = np.zeros((64, 64, 3), np.uint8)
            image[y0:y1, x0:x1] = 200
            cv2.imwrite(str(root / f'{split}/{number}.jpg'), image)
            images.append(
                dict(id=number, file_name=f'{number}.jpg', height=64, width=64)
            )
            annotations.append(
                dict(
                    id=number,
                    image_id=number,
                    category_id=5 + 2 * number,
                    bbox=[x0, y0, x1 - x0, y1 - y0],
                    area=(x1 - x0) * (y1 - y0),
                    iscrowd=0,
                    segmentation=[[x0, y0, x1, y0, x1, y1, x0, y1]],
                )
            )
        categories = [dict(id=5, name='apple'), dict(id=7, name='pear')]
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / f'{split}.json').write_text(json.dumps(content))


WRITE = dict(roads=write_roads, fruit=write_fruit)


@pytest.fixture
def example(tmp_path, request):
    """A folder as the reader has it: configs beside the example, data below it."""
    name, text = request.param
    (tmp_path / 'configs').symlink_to(REPOSITORY / 'configs')
    (tmp_path / f'{name}.py').write_text(text)
    WRITE[name](tmp_path / 'data' / name)
    return tmp_path, name


def train(folder, name, run_tool, *options, check=True):
    workers = (f'{s}_dataloader.num_workers=0' for s in ('train', 'val', 'test'))
    options = (*SMALL[name], *workers, 'model.backbone.num_keys=20', *options)
    return run_tool(
        'train.py', f'{name}.py', '--cfg-options', *options, cwd=folder, check=check
    )


def test_there_is_an_example_for_each_task():
    assert [name for name, _ in EXAMPLES] == [*WRITE]


@pytest.mark.parametrize('example', EXAMPLES, indirect=True)
def test_the_example_trains_and_is_tested(example, run_tool):
    folder, name = example
    train(folder, name, run_tool)
    checkpoint = (folder / f'work_dirs/{name}/last_checkpoint').read_text()
    run_tool(
        'test.py',
        f'{name}.py',
        checkpoint,
        '--show-dir',
        'pictures',
        '--cfg-options',
        'test_dataloader.num_workers=0',
        cwd=folder,
    )
    assert len(list((folder / 'pictures').rglob('*.[jp][pn]g'))) == 2
    metrics = json.loads((folder / f'work_dirs/{name}/metrics.json').read_text())
    assert {'mIoU', 'coco/segm_mAP'} & metrics.keys()


@pytest.mark.parametrize('example', EXAMPLES[1:], indirect=True)
@pytest.mark.parametrize('wrong', [('apple', 'plum'), ('pear', 'apple')])
def test_classes_that_are_not_those_of_the_file(example, run_tool, wrong):
    folder, name = example
    config = folder / 'fruit.py'
    config.write_text(config.read_text().replace(str(('apple', 'pear')), str(wrong)))
    result = train(folder, name, run_tool, check=False)
    assert result.returncode
    assert f'has the classes {wrong}' in result.stderr
    assert "train.json the categories ('apple', 'pear')" in result.stderr
    assert 'Traceback' not in result.stderr
    assert not (folder / 'work_dirs').exists()


@pytest.mark.parametrize('example', EXAMPLES[1:], indirect=True)
def test_a_head_of_other_classes(example, run_tool):
    folder, name = example
    result = train(
        folder, name, run_tool, 'model.roi_head.mask_head.num_classes=3', check=False
    )
    assert result.returncode
    assert 'FCNMaskHead' in result.stderr and '(3)' in result.stderr
