"""Evaluate a checkpoint: python tools/test.py CONFIG CHECKPOINT [--tta]."""

import contextlib
import os
from copy import deepcopy
from pathlib import Path

import mmengine
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.evaluator import DumpResults

from mmdgt.commands import run_command
from mmdgt.files import whole_file, write_text
from mmdgt.frameworks import FRAMEWORKS
from mmdgt.openmmlab.apis.config import check_data, load_config, make_parser
from mmdgt.openmmlab.apis.runner import build_runner, leave_processes


def enable_tta(cfg: Config) -> None:
    """Wrap the model and the test pipeline for test-time augmentation."""
    if 'tta_model' not in cfg:
        raise ValueError('--tta needs tta_model in the config, which has none')
    if 'tta_pipeline' not in cfg:  # Flip, and average, what the config tests with.
        *load, pack = deepcopy(cfg.test_dataloader.dataset.pipeline)
        flips = [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)]
        augment = dict(type='TestTimeAug', transforms=[flips, [pack]])
        cfg.tta_pipeline = [*load, augment]
    cfg.model = dict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


def enable_visualization(cfg: Config, show: bool, show_dir: str | None) -> None:
    """Draw the predictions, on the screen or into a folder."""
    show_dir = show_dir and os.path.abspath(show_dir)  # else mmdet's lies in work_dir
    settings = FRAMEWORKS[cfg.default_scope].show_settings(show, show_dir)
    cfg.default_hooks.visualization.update(settings)
    if show_dir:  # where mmseg's visualizer draws to
        cfg.visualizer.save_dir = show_dir


def main() -> None:
    """Build the Runner that the config describes and let it test."""
    parser = make_parser('Evaluate a segmentor, detector or classifier')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--tta', action='store_true', help='augment: several scales, flips'
    )
    parser.add_argument(
        '--out',
        help='where the predictions go: a folder of label maps for segmentation, a'
        ' .pkl file otherwise',
    )
    parser.add_argument('--show', action='store_true', help='show the predictions')
    parser.add_argument('--show-dir', help='folder for pictures of the predictions')
    args = parser.parse_args()
    cfg = load_config(args)
    check_data(cfg, 'test_dataloader')
    cfg.load_from = args.checkpoint
    cfg.resume = False  # In a work dir the config is that of a training, maybe resumed.
    to_folder = FRAMEWORKS[cfg.default_scope].predictions_in_folder
    if args.out and to_folder:
        cfg.test_evaluator.output_dir = args.out
    elif args.out and Path(args.out).suffix not in ('.pkl', '.pickle'):
        parser.error(f'--out must name a .pkl file, got {args.out}')
    if args.tta:
        enable_tta(cfg)
    if args.show or args.show_dir:
        enable_visualization(cfg, args.show, args.show_dir)

    runner = build_runner(cfg)
    with contextlib.ExitStack() as stack:
        if args.out and not to_folder:
            part = args.out
            if is_main_process():  # which alone writes it
                part = stack.enter_context(whole_file(args.out))
            runner.test_evaluator.metrics.append(DumpResults(str(part)))
        metrics = runner.test()
    name = 'metrics_tta.json' if args.tta else 'metrics.json'
    if is_main_process():
        text = mmengine.dump(metrics, file_format='json', indent=2)
        write_text(Path(cfg.work_dir, name), text)
    leave_processes()


if __name__ == '__main__':
    run_command(main)
