"""Draws a small data set of textured shapes for all three tasks.

Every scene is written once and annotated twice; cut into its shapes it serves
classification::

    OUT/meta.json                                 classes, palette, parameters
    OUT/ade20k/images/{training,validation}/      *.jpg
    OUT/ade20k/annotations/{training,validation}/ *.png, 0 is unlabelled
    OUT/coco/annotations/instances_{train,val}2017.json
    OUT/coco/{train,val}2017                      links to the images above
    OUT/imagenet/{train,val}/CLASS/               *.jpg, named SCENE_ANNOTATION

``OUT/ade20k``, ``OUT/coco`` and ``OUT/imagenet`` serve as ``data_root`` where the
real ones would. A label of ADE20K's layout and a ``category_id`` of COCO's are the same
number. Needs NumPy and OpenCV only; the same seed gives the same bytes.
"""

import argparse
import hashlib
import json
import os
import tempfile
from pathlib import Path

import cv2
import demo_scenes
import numpy as np
from demo_scenes import CLASSES, PALETTE, draw_scene

MIN_SIZE = 32
SPLITS = (('train', 'training'), ('val', 'validation'))  # COCO's, ADE20K's name
MIN_CROP = 1 / 8  # shorter side of a shape to classify, of the image's
MARGIN = 1.25  # side of a crop over the longer side of its shape


def segmentation(mask):
    """Describes a mask (S, S) bool exactly, by a polygon or else by run lengths.

    Returns:
        COCO's ``[[x0, y0, x1, y1, ...]]`` for one piece without a hole, else
        ``dict(size, counts)`` with COCO's uncompressed, column-major runs.
    """
    # At twice the size, the contour through pixel centres tells on which side of
    # a pixel it runs, so halving gives the corners of the pixels.
    double = np.kron(mask.astype(np.uint8), np.ones((2, 2), np.uint8))
    contours, _ = cv2.findContours(double, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if len(contours) == 1:
        corners = (contours[0][:, 0] + 1) // 2
        corners = corners[np.any(corners != np.roll(corners, 1, 0), 1)]
        before, after = np.roll(corners, 1, 0), np.roll(corners, -1, 0)
        turns = np.all(before != after, 1)
        return [corners[turns].ravel().tolist()]
    flat = np.concatenate([[False], mask.ravel(order='F')])
    starts = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(starts, prepend=0, append=mask.size).tolist()
    return dict(size=list(mask.shape), counts=counts)


def coco_annotation(identity, image_id, label, crowd, mask):
    """Returns one entry of COCO's ``annotations``."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return dict(
        id=identity,
        image_id=image_id,
        category_id=label,
        bbox=[x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
        area=int(mask.sum()),
        iscrowd=int(crowd),
        segmentation=segmentation(mask),
    )


def crop_around(image, bbox):
    """Cuts out a box and a margin: a square as large as the image allows.

    Returns:
        (s, s, 3) uint8, or None if the box is too small to recognise the shape.
    """
    x, y, width, height = bbox
    size = len(image)
    if min(width, height) < MIN_CROP * size:
        return None
    side = min(round(MARGIN * max(width, height)), size)
    top, left = (
        min(max(start + (extent - side) // 2, 0), size - side)
        for start, extent in ((y, height), (x, width))
    )
    return image[top : top + side, left : left + side]


def jpeg(image):
    """Returns an image encoded as JPEG."""
    return cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]


def write(path, data):
    """Writes an encoded picture, or anything else as JSON."""
    if not isinstance(data, np.ndarray):
        data = json.dumps(data, separators=(',', ':')).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_split(root, split, count, seed, size):
    """Draws one split and writes it in the three layouts."""
    coco_name, ade_name = SPLITS[split]
    images, annotations = [], []
    shapes = list(enumerate(CLASSES, 1))[1:]
    crops = root / 'imagenet' / coco_name
    for _, name in shapes:  # the folders are the classes, with pictures or without
        (crops / name).mkdir(parents=True)
    for number in range(count):
        scene = draw_scene(seed, split, number, size)
        stem = f'{coco_name}_{number + 1:05d}'
        write(root / 'ade20k/images' / ade_name / f'{stem}.jpg', jpeg(scene.image))
        png = cv2.imencode('.png', scene.label_map())[1]
        write(root / 'ade20k/annotations' / ade_name / f'{stem}.png', png)
        image_id = number + 1
        images.append(
            dict(id=image_id, file_name=f'{stem}.jpg', height=size, width=size)
        )
        for label, crowd, mask in scene.objects():
            identity = len(annotations) + 1
            annotation = coco_annotation(identity, image_id, label, crowd, mask)
            annotations.append(annotation)
            crop = None if crowd else crop_around(scene.image, annotation['bbox'])
            if crop is not None:
                path = crops / CLASSES[label - 1] / f'{stem}_{identity}.jpg'
                write(path, jpeg(crop))
        if (number + 1) % 20 == 0 or number + 1 == count:
            print(f'\r{ade_name}: {number + 1}/{count} scenes', end='', flush=True)
    print()
    categories = [dict(id=label, name=name) for label, name in shapes]
    write(
        root / f'coco/annotations/instances_{coco_name}2017.json',
        dict(images=images, annotations=annotations, categories=categories),
    )
    link = root / f'coco/{coco_name}2017'
    link.symlink_to(Path('../ade20k/images', ade_name), target_is_directory=True)


def fingerprint():
    """Tells versions of the drawing and writing code apart."""
    sources = (Path(demo_scenes.__file__), Path(__file__))
    code = b''.join(source.read_bytes() for source in sources)
    return hashlib.sha256(code).hexdigest()[:12]


def check_reusable(out, meta):
    """Returns whether ``out`` holds this very data; raises if it holds other."""
    if not out.exists():
        return False
    if not (out / 'meta.json').is_file():
        raise SystemExit(
            f'{out} exists, but has no meta.json of this tool in it. '
            'Remove it or name another folder with --out.'
        )
    found = json.loads((out / 'meta.json').read_text())
    differences = [
        f'{key} {found.get(key)!r} there, {value!r} now'
        for key, value in meta.items()
        if found.get(key) != value
    ]
    if differences:
        raise SystemExit(
            f'{out} holds other data: {"; ".join(differences)}. '
            'Remove it or name another folder with --out.'
        )
    return True


def make_demo_data(out, train, val, size, seed):
    """Writes the data set to ``out`` unless it is there already."""
    if size < MIN_SIZE:
        raise SystemExit(f'--size: expected at least {MIN_SIZE} pixels, got {size}.')
    for flag, value, least in (('train', train, 1), ('val', val, 1), ('seed', seed, 0)):
        if value < least:
            raise SystemExit(f'--{flag}: expected at least {least}, got {value}.')
    meta = dict(
        classes=list(CLASSES),
        palette=[list(colour) for colour in PALETTE],
        train=train,
        val=val,
        size=size,
        seed=seed,
        drawn_by=fingerprint(),
    )
    if check_reusable(out, meta):
        print(f'{out} already holds these scenes; reusing them.')
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete, so that a killed run leaves nothing half-written.
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as folder:
        root = Path(folder) / out.name
        write_split(root, 0, train, seed, size)
        write_split(root, 1, val, seed, size)
        write(root / 'meta.json', meta)
        os.rename(root, out)
    print(f'{out}: {train} scenes to train on and {val} to validate on.')


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, default=Path('data/demo'))
    parser.add_argument('--train', type=int, default=800, help='training scenes')
    parser.add_argument('--val', type=int, default=60, help='validation scenes')
    parser.add_argument('--size', type=int, default=128, help='side in pixels')
    parser.add_argument('--seed', type=int, default=0)
    make_demo_data(**vars(parser.parse_args()))


if __name__ == '__main__':
    main()
