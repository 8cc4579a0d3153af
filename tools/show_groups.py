"""Draw the groups of DG-Attention over a picture, as figure 3 of the paper does.

``python tools/show_groups.py CONFIG CHECKPOINT IMAGE --out groups.png``. Statistics go
to the terminal and to a JSON file beside the picture. Stages, blocks and heads count
from 1, groups and pixels from 0; pixels are those of the picture as the network sees
it, after the config's test pipeline.
"""

import argparse
import json
from pathlib import Path

import cv2
import mmcv
import numpy as np
from demo_report import captioned, frame
from mmengine.config import Config

from mmdgt.engine.inference import Predictor, read_image
from mmdgt.visualization import (
    Groups,
    draw_groups,
    draw_keys,
    draw_queries,
    find_groups,
    group_at,
    group_statistics,
)

MIN_WIDTH = 320  # of a panel; smaller pictures are enlarged
MARKER = (255, 255, 255)
LARGEST = 3  # groups that are drawn if none is picked


def figure(
    image: np.ndarray,
    groups: Groups,
    pixels: list[tuple[int, int]],
    picked: list[int],
) -> np.ndarray:
    """All groups, the queries of one and its keys, side by side.

    Args:
        image (ndarray): (H, W, 3) uint8, RGB.
        groups (Groups): What a head chose for it.
        pixels (list[tuple[int, int]]): (x, y); each gets a row, with its group.
        picked (list[int]): Groups; each gets a row. The largest if both are empty.

    Returns:
        ndarray: (H', W', 3) uint8, RGB.

    Raises:
        ValueError: If there is no such pixel or group.
    """
    rows = [(group_at(image, groups, x, y), (x, y)) for x, y in pixels]
    rows += [(group, None) for group in picked]
    if not rows:
        largest = np.argsort(group_statistics(groups)['group_sizes'])[::-1]
        rows = [(int(group), None) for group in largest[:LARGEST]]
    factor = max(1, -(-MIN_WIDTH // image.shape[1]))
    drawn = []
    for group, pixel in rows:
        panels = [
            mmcv.imrescale(panel, factor, interpolation='nearest')
            for panel in (
                draw_groups(image, groups),
                draw_queries(image, groups, group),
                draw_keys(image, groups, group),
            )
        ]
        if pixel:
            centre = [factor * side + factor // 2 for side in pixel]
            for panel in panels:
                cv2.drawMarker(panel, centre, MARKER, cv2.MARKER_CROSS, 18, 2)
        drawn.append(np.hstack([frame(panel) for panel in panels]))
    return captioned(drawn, ('all groups', 'queries of a group', 'its keys'))


def pixel(text: str) -> tuple[int, int]:
    """Read X,Y."""
    x, y = map(int, text.split(','))
    return x, y


def main() -> None:
    """Draw, count, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('checkpoint', help='file, or "random" for random weights')
    parser.add_argument('image')
    parser.add_argument('--out', type=Path, default=Path('groups.png'), help='picture')
    for what in ('stage', 'block', 'head'):
        parser.add_argument(f'--{what}', type=int, default=1)
    parser.add_argument(
        '--pixels', nargs='+', type=pixel, default=[], metavar='X,Y', help='of groups'
    )
    parser.add_argument(
        '--groups',
        nargs='+',
        type=int,
        default=[],
        help='groups by number; without them and pixels, the three largest',
    )
    args = parser.parse_args()
    picture = read_image(args.image)
    checkpoint = None if args.checkpoint == 'random' else args.checkpoint
    predictor = Predictor(Config.fromfile(args.config), checkpoint)
    image, inputs = predictor.see(picture)
    groups = find_groups(predictor.model, inputs, args.stage, args.block, args.head)
    drawn = figure(image, groups, args.pixels, args.groups)
    mmcv.imwrite(mmcv.rgb2bgr(drawn), str(args.out))
    place = dict(stage=args.stage, block=args.block, head=args.head)
    report = {
        'config': args.config,
        'checkpoint': args.checkpoint,
        'image': args.image,
        **place,
        'width': image.shape[1],
        'height': image.shape[0],
        'group_of_pixels': {
            f'{x},{y}': group_at(image, groups, x, y) for x, y in args.pixels
        },
        **group_statistics(groups),
    }
    numbers = args.out.with_suffix('.json')
    numbers.write_text(json.dumps(report, indent=2) + '\n')
    for what, value in {**report, 'picture': args.out, 'numbers': numbers}.items():
        if isinstance(value, float):
            value = f'{value:.4g}'
        if not isinstance(value, list):
            print(f'{what + ":":24}{value}')


if __name__ == '__main__':
    main()
