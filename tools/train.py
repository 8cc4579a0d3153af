"""Train a model: python tools/train.py CONFIG."""

from mmdgt.engine.config import check_data, load_config, make_parser
from mmdgt.engine.runner import build_runner


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
        '--amp', action='store_true', help='train in automatic mixed precision'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the batch size over the one of the config',
    )
    args = parser.parse_args()
    cfg = load_config(args)
    check_data(cfg, 'train_dataloader', *['val_dataloader'] * bool(cfg.val_cfg))
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume

    build_runner(cfg).train()


if __name__ == '__main__':
    main()
