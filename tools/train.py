"""Train a model: python tools/train.py CONFIG."""

import contextlib

from mmengine.device import get_device

from mmdgt.commands import run_command
from mmdgt.openmmlab.apis.config import check_data, load_config, make_parser
from mmdgt.openmmlab.apis.runner import build_runner, leave_processes
from mmdgt.openmmlab.engine import Interrupted


def main() -> None:
    """Build the Runner that the config describes and let it train."""
    parser = make_parser('Train a segmentor, detector or classifier')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from a checkpoint, by default from the latest in the work dir',
    )
    parser.add_argument(
        '--trust',
        action='store_true',
        help='resume from a checkpoint that holds more than plain data, as older ones'
        ' of the frameworks do; loading it can run any code',
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const='float16',
        choices=('float16', 'bfloat16'),
        help='train in automatic mixed precision, float16 by default; on a CPU'
        ' only bfloat16 works',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the batch size over the one of the config',
    )
    args = parser.parse_args()
    if args.trust and not args.resume:
        parser.error('--trust is for --resume')
    cfg = load_config(args)
    validates = cfg.get('val_cfg') is not None  # {} is mmengine's default loop
    check_data(cfg, 'train_dataloader', *['val_dataloader'] * validates)
    if args.amp == 'float16' and get_device() == 'cpu':
        parser.error('--amp float16 needs a GPU; here use --amp bfloat16')
    if args.amp:
        wrappers = dict(float16='AmpOptimWrapper', bfloat16='BFloat16OptimWrapper')
        cfg.optim_wrapper.type = wrappers[args.amp]
    if args.auto_scale_lr:
        cfg.auto_scale_lr.enable = True
    if args.resume:
        # 'auto': with nothing to go on from, load_from of the config counts.
        cfg.resume = args.resume
        if args.resume != 'auto':
            cfg.resume, cfg.load_from = True, args.resume
        cfg.trust = args.trust

    with contextlib.suppress(Interrupted):
        build_runner(cfg).train()
    leave_processes()


if __name__ == '__main__':
    run_command(main)
