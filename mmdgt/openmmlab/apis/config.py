"""What the command-line tools do to a config before the Runner gets it."""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.logging import print_log

from ...configs import find_config
from ...weights import some

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def make_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that all tools share, named as OpenMMLab names them."""
    parser = argparse.ArgumentParser(description=description)
    add_config(parser)
    parser.add_argument(
        '--work-dir', help='folder for logs and results; work_dirs/CONFIG by default'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='override settings of the config, such as train_cfg.max_iters=100 or'
        ' model.backbone.out_indices="(1,2,3)"; data_root=DIR reaches every path'
        ' below the old data_root',
    )
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='job launcher',
    )
    add_allow_partial(parser)
    # torch.distributed.launch passes it; torchrun sets the variable instead.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """A config, of one's own or of the package."""
    parser.add_argument(
        'config', type=find_config, help='file, or name of a config of mmdgt'
    )


def add_allow_partial(parser: argparse.ArgumentParser) -> None:
    """The one way to use weights that are not those of the model."""
    parser.add_argument(
        '--allow-partial',
        action='store_true',
        help='load what fits of a checkpoint, and only warn of tensors that are'
        ' missing, unexpected, of another shape or not finite',
    )


def load_config(args: argparse.Namespace) -> Config:
    """Read the config that the arguments name and apply their overrides.

    Args:
        args (Namespace): Of :func:`make_parser`.

    Returns:
        Config: With ``work_dir`` and ``launcher`` set.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(args.config)
    old_root = cfg.get('data_root')
    cfg.merge_from_dict(args.cfg_options)
    # The config has put data_root into other settings while it was read.
    if old_root and cfg.data_root != old_root:
        cfg._cfg_dict.update(_moved(cfg._cfg_dict.to_dict(), old_root, cfg.data_root))
    for loader in LOADERS:
        if loader in cfg and cfg[loader] and not cfg[loader].get('num_workers'):
            cfg[loader].persistent_workers = False  # There is none to persist.
    cfg.launcher = args.launcher
    if args.allow_partial:
        cfg.allow_partial = True
    default = os.path.join('work_dirs', Path(args.config).stem)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or default
    return cfg


def _moved(node: Any, old: str, new: str) -> Any:
    """Replace a leading folder in every string of a config."""
    if isinstance(node, dict):
        return {key: _moved(value, old, new) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_moved(value, old, new) for value in node)
    if isinstance(node, str) and (
        node == old or node.startswith(old.rstrip('/') + '/')
    ):
        return new.rstrip('/') + node[len(old.rstrip('/')) :]
    return node


def check_data(cfg: Config, *loaders: str) -> None:
    """Make sure that the data are where the config points.

    Args:
        cfg (Config): The config.
        loaders (str): Which of its data loaders are going to be used.

    Raises:
        FileNotFoundError: If a folder or an annotation file is missing or empty.
        ValueError: If the config names other classes than COCO's annotation file.
    """
    for loader in loaders:
        dataset = cfg[loader].dataset
        while 'dataset' in dataset:  # wrapped, to repeat it for instance
            dataset = dataset.dataset
        root = dataset.get('data_root') or ''
        prefixes = dataset.get('data_prefix', {})
        if isinstance(prefixes, str):  # as mmpretrain takes them
            prefixes = {'data_prefix': prefixes}
        parts = {'data_root': '', **prefixes}
        if dataset.get('ann_file'):
            parts['ann_file'] = dataset.ann_file
        for setting, part in parts.items():
            path = Path(root, part)
            if not path.exists() or (path.is_dir() and not any(path.iterdir())):
                state = 'is empty' if path.exists() else 'does not exist'
                raise FileNotFoundError(
                    f'{loader} of the config expects data in {path} (its {setting}),'
                    f' which {state}. Put the data there, or say where they are:'
                    f' --cfg-options data_root=DIR'
                )
        classes = dataset.get('metainfo', {}).get('classes')
        if dataset.type == 'CocoDataset' and classes:
            _check_categories(loader, Path(root, parts['ann_file']), classes)


def _check_references(ann_file: Path, content: dict) -> None:
    """Make sure that annotations belong to pictures and categories of the file.

    mmdetection drops the others without a word.
    """
    for key, of in (('image_id', 'images'), ('category_id', 'categories')):
        known = {entry['id'] for entry in content[of]}
        lost = [x['id'] for x in content['annotations'] if x[key] not in known]
        if lost:
            raise ValueError(
                f'{ann_file}: {len(lost)} annotations, such as number {lost[0]}, have'
                f' an {key} that is not among the {of}'
            )


def _report_lost_boxes(ann_file: Path, content: dict) -> None:
    """Warn of the objects that mmdetection leaves out without a word.

    Those whose box has no area inside its picture, or a side below one pixel.
    """
    sizes = {x['id']: (x.get('width'), x.get('height')) for x in content['images']}
    lost = []
    for annotation in content['annotations']:
        x, y, width, height = annotation['bbox']
        right, bottom = sizes[annotation['image_id']]
        outside = right is not None and (
            min(x + width, right) <= max(x, 0) or min(y + height, bottom) <= max(y, 0)
        )
        if outside or min(width, height) < 1 or annotation.get('area', 1) <= 0:
            lost.append(annotation['id'])
    if lost:
        print_log(
            f'{ann_file}: {some(lost)} of its {len(content["annotations"])} annotations'
            f' are left out by mmdetection: boxes outside of their picture, without an'
            f' area or with a side below one pixel',
            logger='current',
            level=logging.WARNING,
        )


def _check_categories(loader: str, ann_file: Path, classes: Sequence[str]) -> None:
    """Compare classes to the categories of a file.

    mmdetection drops the objects of other categories without a word, and numbers
    the classes as they come in the file, whatever their order in the config.
    """
    content = json.loads(ann_file.read_text())
    _check_references(ann_file, content)
    _report_lost_boxes(ann_file, content)
    names = [category['name'] for category in content['categories']]
    if list(classes) != [name for name in names if name in classes]:
        raise ValueError(
            f'{loader} of the config has the classes {tuple(classes)}, but {ann_file}'
            f' the categories {tuple(names)}. Name in metainfo.classes those'
            f' categories to learn, in the order of the file'
        )
