"""The demo data: what the files say against what independent readers make of them."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip('cv2')

TOOL = Path(__file__).parents[1] / 'tools' / 'make_demo_data.py'
TRAIN, VAL, SIZE = 60, 20, 128
SPLITS = [('train', 'training', TRAIN), ('val', 'validation', VAL)]


def run_tool(out, **options):
    flags = [f'--{name}={value}' for name, value in options.items()]
    return subprocess.run(
        [sys.executable, TOOL, f'--out={out}', *flags], capture_output=True, text=True
    )


def all_bytes(root):
    return {
        path.relative_to(root): path.read_bytes()
        for path in sorted(root.rglob('*'))
        if path.is_file()
    }


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp('demo') / 'parent' / 'data'
    result = run_tool(out, train=TRAIN, val=VAL, size=SIZE)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in out.parent.iterdir()] == ['data']
    return out


def label_maps(data, split):
    folder = data / 'ade20k/annotations' / split
    paths = sorted(folder.glob('*.png'))
    return {p.stem: cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in paths}


def instances(data, split):
    path = data / f'coco/annotations/instances_{split}2017.json'
    return json.loads(path.read_text())


def test_meta_names_a_colour_for_every_class(data):
    meta = json.loads((data / 'meta.json').read_text())
    assert len(meta['classes']) == len(set(meta['classes'])) == 7
    assert meta['classes'][0] == 'background'
    assert len({tuple(colour) for colour in meta['palette']}) == 7
    assert (meta['train'], meta['val'], meta['size']) == (TRAIN, VAL, SIZE)
    for split in ('train', 'val'):
        categories = instances(data, split)['categories']
        names = {category['id']: category['name'] for category in categories}
        # The category is the label of the ADE20K layout, where 0 is unlabelled.
        assert names == {n + 2: name for n, name in enumerate(meta['classes'][1:])}


@pytest.mark.parametrize(('coco', 'ade', 'count'), SPLITS)
def test_segmentation_and_detection_show_the_same_pictures(data, coco, ade, count):
    labels = label_maps(data, ade)
    images = instances(data, coco)['images']
    assert len(labels) == len(images) == count
    assert len({image['id'] for image in images}) == count
    for image in images:
        path = data / f'coco/{coco}2017' / image['file_name']
        assert path.samefile(data / 'ade20k/images' / ade / path.name)
        assert cv2.imread(str(path)).shape == (image['height'], image['width'], 3)
        label = labels[path.stem]
        assert label.shape == (SIZE, SIZE) and label.dtype == np.uint8


@pytest.mark.parametrize(('coco', 'ade', 'count'), SPLITS)
def test_every_class_occurs_and_little_is_unlabelled(data, coco, ade, count):
    pixels = np.bincount(np.stack([*label_maps(data, ade).values()]).ravel())
    assert len(pixels) == 8 and pixels.min() > 0
    share = pixels / pixels.sum()
    assert 0.001 < share[0] < 0.04
    assert 0.5 < share[1] < 0.85
    assert share[2:].min() > 0.01


@pytest.mark.parametrize(('coco', 'ade', 'count'), SPLITS)
def test_pycocotools_reads_what_the_label_maps_show(data, coco, ade, count):
    pycocotools = pytest.importorskip('pycocotools.coco')
    api = pycocotools.COCO(data / f'coco/annotations/instances_{coco}2017.json')
    labels = label_maps(data, ade)
    forms = Counter()
    for image in api.loadImgs(api.getImgIds()):
        label = labels[Path(image['file_name']).stem]
        painted = np.zeros_like(label)
        for annotation in api.imgToAnns[image['id']]:
            mask = api.annToMask(annotation).astype(bool)
            rows, columns = np.nonzero(mask)
            extent = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation['bbox'] == extent
            assert annotation['area'] == mask.sum() >= 16
            assert not painted[mask].any(), 'two instances own one pixel'
            painted[mask] = annotation['category_id']
            polygon = isinstance(annotation['segmentation'], list)
            forms['polygon' if polygon else 'runs', annotation['iscrowd']] += 1
            background = 1 - mask.astype(np.uint8)
            pieces = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[0]
            # Padded, so that the background around the shape is one piece.
            background = np.pad(background, 1, constant_values=1)
            outside = cv2.connectedComponents(background, connectivity=4)[0]
            assert polygon == (pieces == 2 and outside == 2)
        np.testing.assert_array_equal(painted, np.where(label == 1, 0, label))
    assert len(api.anns) == len(api.dataset['annotations']) == sum(forms.values())
    assert forms['polygon', 0] > 2 * count and forms['runs', 0] > 0.3 * count
    assert forms['runs', 1] > 0


def outlined(mask):
    """Returns the mask after a round trip through its description."""
    mask_api = pytest.importorskip('pycocotools.mask')
    sys.path.insert(0, str(TOOL.parent))
    try:
        from make_demo_data import segmentation
    finally:
        sys.path.remove(str(TOOL.parent))
    found = segmentation(mask)
    if isinstance(found, list):
        assert len(found) == 1
        return mask_api.decode(mask_api.frPyObjects(found, *mask.shape))[..., 0]
    assert found['size'] == list(mask.shape) and sum(found['counts']) == mask.size
    return mask_api.decode(mask_api.frPyObjects(found, *mask.shape))


@pytest.mark.parametrize(('coco', 'ade', 'count'), SPLITS)
def test_crops_show_one_shape_in_its_surroundings(data, coco, ade, count):
    found = instances(data, coco)
    names = {category['id']: category['name'] for category in found['categories']}
    folder = data / 'imagenet' / coco
    assert {path.name for path in folder.iterdir()} == set(names.values())
    crops = {int(p.stem.split('_')[-1]): p for p in sorted(folder.rglob('*.jpg'))}
    for annotation in found['annotations']:
        x, y, width, height = annotation['bbox']
        recognisable = min(width, height) >= SIZE / 8 and not annotation['iscrowd']
        assert recognisable == (annotation['id'] in crops)
        if not recognisable:
            continue
        path = crops[annotation['id']]
        image = f'{coco}_{annotation["image_id"]:05d}'
        assert path.stem == f'{image}_{annotation["id"]}'
        assert path.parent.name == names[annotation['category_id']]
        crop = cv2.imread(str(path))
        side = min(round(1.25 * max(width, height)), SIZE)
        assert crop.shape == (side, side, 3)
        if annotation['id'] % 10:  # looking for the crop takes time
            continue
        scene = cv2.imread(str(data / 'ade20k/images' / ade / f'{image}.jpg'))
        distances = cv2.matchTemplate(scene, crop, cv2.TM_SQDIFF)
        _, _, (left, top), _ = cv2.minMaxLoc(distances)
        # The same but for the losses of JPEG.
        assert distances.min() < 6**2 * crop.size
        assert left <= x and x + width <= left + side
        assert top <= y and y + height <= top + side


@pytest.mark.parametrize('share', [0.02, 0.3, 0.5, 0.7, 0.95])
def test_segmentation_is_exact_for_any_mask(share):
    rng = np.random.default_rng(0)
    for _ in range(100):
        mask = rng.random(rng.integers(1, 9, 2)) < share
        mask.flat[rng.integers(mask.size)] = True
        np.testing.assert_array_equal(outlined(mask), mask)


def test_segmentation_of_a_pixel_and_of_everything():
    everything = np.ones((5, 7), bool)
    pixel = np.zeros((5, 7), bool)
    pixel[4, 6] = True
    np.testing.assert_array_equal(outlined(everything), everything)
    np.testing.assert_array_equal(outlined(pixel), pixel)


def test_colour_alone_does_not_give_the_class(data):
    def mean_colours(coco, ade):
        labels = label_maps(data, ade)
        colours, classes = [], []
        for stem, label in labels.items():
            image = cv2.imread(str(data / 'ade20k/images' / ade / f'{stem}.jpg'))
            for number in set(np.unique(label)) - {0, 1}:
                colours.append(image[label == number].mean(0))
                classes.append(number)
        return np.array(colours), np.array(classes)

    colours, classes = mean_colours('train', 'training')
    centroids = np.stack([colours[classes == c].mean(0) for c in range(2, 8)])
    colours, classes = mean_colours('val', 'validation')
    distances = np.linalg.norm(colours[:, None] - centroids, axis=-1)
    # Four classes share their colours in pairs, and the other two overlap: at most
    # (4 / 2 + 2) / 6 could be told.
    assert 0.25 < np.mean(distances.argmin(1) + 2 == classes) < 0.67


def test_same_seed_same_bytes(data, tmp_path):
    result = run_tool(tmp_path / 'again', train=TRAIN, val=VAL, size=SIZE)
    assert result.returncode == 0, result.stderr
    assert all_bytes(tmp_path / 'again') == all_bytes(data)


def test_a_scene_depends_on_the_seed_but_not_on_their_number(data, tmp_path):
    run_tool(tmp_path / 'few', train=3, val=1, size=SIZE)
    run_tool(tmp_path / 'other', train=3, val=1, size=SIZE, seed=1)
    name = 'ade20k/images/training/train_00003.jpg'
    validation = 'ade20k/images/validation/val_00001.jpg'
    assert (tmp_path / 'few' / name).read_bytes() == (data / name).read_bytes()
    assert (tmp_path / 'other' / name).read_bytes() != (data / name).read_bytes()
    first = (data / name.replace('00003', '00001')).read_bytes()
    assert first != (data / validation).read_bytes()


def test_odd_and_smallest_sizes(tmp_path):
    for size in (32, 97):
        result = run_tool(tmp_path / str(size), train=4, val=2, size=size)
        assert result.returncode == 0, result.stderr
        labels = label_maps(tmp_path / str(size), 'training')
        assert {label.shape for label in labels.values()} == {(size, size)}


def test_a_second_run_reuses_what_is_there(tmp_path):
    out = tmp_path / 'data'
    assert run_tool(out, train=2, val=1).returncode == 0
    picture = out / 'ade20k/images/training/train_00001.jpg'
    before = picture.stat().st_mtime_ns
    result = run_tool(out, train=2, val=1)
    assert result.returncode == 0 and 'reusing' in result.stdout
    assert picture.stat().st_mtime_ns == before

    result = run_tool(out, train=3, val=1, seed=5)
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert 'train 2 there, 3 now' in result.stderr
    assert 'seed 0 there, 5 now' in result.stderr
    assert picture.stat().st_mtime_ns == before


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / 'note.txt').write_text('mine')
    result = run_tool(tmp_path, train=2, val=1)
    assert result.returncode == 1 and 'meta.json' in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ['note.txt']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(size=31), '--size: expected at least 32 pixels, got 31'),
        (dict(train=-1), '--train: expected at least 1, got -1'),
        (dict(val=0), '--val: expected at least 1, got 0'),
        (dict(seed=-2), '--seed: expected at least 0, got -2'),
    ],
)
def test_bad_input_writes_nothing(tmp_path, options, message):
    result = run_tool(tmp_path / 'data', **options)
    assert result.returncode == 1 and message in result.stderr
    assert 'Traceback' not in result.stderr
    assert not any(tmp_path.iterdir())


def test_a_killed_run_leaves_nothing_half_written(tmp_path):
    out = tmp_path / 'data'
    tool = subprocess.Popen(
        [sys.executable, TOOL, f'--out={out}'], stdout=subprocess.PIPE
    )
    with tool:
        assert tool.stdout.read(10)  # the first scenes are being drawn
        tool.kill()
    assert not out.exists()
    assert run_tool(out, train=2, val=1).returncode == 0
