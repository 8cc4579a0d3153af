"""Draw the groups of DG-Attention over a picture, as figure 3 of the paper does.

``python tools/show_groups.py CONFIG CHECKPOINT IMAGE --out groups.png``. Statistics go
to the terminal and to a JSON file beside the picture. Stages, blocks and heads count
from 1, groups and pixels from 0; pixels are those of the picture as the network sees
it, after the config's test pipeline.
"""

import argparse
from pathlib import Path

import mmcv
from mmengine.config import Config

from mmdgt.commands import run_command
from mmdgt.files import write_json
from mmdgt.openmmlab.apis.config import add_allow_partial, add_config
from mmdgt.openmmlab.apis.inference import Predictor, read_image
from mmdgt.openmmlab.apis.pictures import group_panels, write_picture
from mmdgt.visualization import find_groups, group_at, group_statistics


def pixel(text: str) -> tuple[int, int]:
    """Read X,Y."""
    x, y = map(int, text.split(','))
    return x, y


def main() -> None:
    """Draw, count, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config(parser)
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
    add_allow_partial(parser)
    args = parser.parse_args()
    picture = read_image(args.image)
    checkpoint = None if args.checkpoint == 'random' else args.checkpoint
    predictor = Predictor(
        Config.fromfile(args.config), checkpoint, allow_partial=args.allow_partial
    )
    image, inputs = predictor.see(picture)
    groups = find_groups(predictor.model, inputs, args.stage, args.block, args.head)
    drawn = group_panels(image, groups, args.pixels, args.groups)
    write_picture(args.out, mmcv.rgb2bgr(drawn))
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
    write_json(numbers, report)
    for what, value in {**report, 'picture': args.out, 'numbers': numbers}.items():
        if isinstance(value, float):
            value = f'{value:.4g}'
        if not isinstance(value, list):
            print(f'{what + ":":24}{value}')


if __name__ == '__main__':
    run_command(main)
