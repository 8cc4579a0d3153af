"""Score and time of a trained network by K, the keys of a group, without retraining.

    python tools/sweep_keys.py CONFIG CHECKPOINT --num-keys 16 32 64 98 --metric mIoU

K shapes no parameter, so one checkpoint is evaluated with every K, at last with all
keys. The time is that of the backbone's forward pass on the first picture, all K taking
turns. Writes a JSON and a plot.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import add_out, find_out, in_turns, machine, save, summary
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner
from torch import Tensor

from mmdgt.commands import run_command
from mmdgt.files import whole_file
from mmdgt.frameworks import FRAMEWORKS
from mmdgt.openmmlab.apis.config import check_data, load_config, make_parser
from mmdgt.openmmlab.apis.runner import build_runner

ALL = 2**30  # clamped to the tokens


def first_picture(runner: Runner) -> Tensor:
    """The first picture of the evaluation as the backbone gets it, (1, 3, H, W)."""
    item = runner.test_dataloader.dataset[0]
    data = runner.model.data_preprocessor(pseudo_collate([item]), training=False)
    return data['inputs']


def sweep(runner: Runner, metric: str, keys: list[int], rounds: int) -> list[dict]:
    """A row for every K: its score and the backbone's time."""
    backbone = runner.model.backbone
    scores = {}
    for num_keys in keys:
        backbone.set_num_keys(num_keys)
        metrics = runner.test()
        if metric not in metrics:
            raise ValueError(f'--metric must be one of {list(metrics)}, got {metric}')
        _, factor = FRAMEWORKS[runner.cfg.default_scope].scores.get(metric, (metric, 1))
        scores[num_keys] = round(factor * float(metrics[metric]), 2)
        print(f'K = {name_of(num_keys)}: {metric} {scores[num_keys]}', flush=True)
    picture = first_picture(runner)

    def call(num_keys: int) -> None:
        backbone.set_num_keys(num_keys)
        backbone(picture)

    device = picture.device.type
    backbone.eval()
    with torch.no_grad():
        calls: dict[Any, Callable] = {k: partial(call, k) for k in keys}
        for warm_up in calls.values():
            warm_up()
        times = in_turns(calls, device, rounds, budget=10)
    return [
        dict(K=name_of(k), score=scores[k], **summary(times[k], 'ms', 1e3))
        for k in keys
    ]


def name_of(num_keys: int) -> int | str:
    """K as the table has it."""
    return 'all' if num_keys == ALL else num_keys


def plot(file: Path, metric: str, rows: list[dict], trained: int) -> None:
    """Score by time with its quartiles, every K a point; the training's K filled."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(6, 4))
    ms, scores = ([row[what] for row in rows] for what in ('ms', 'score'))
    ax.plot(ms, scores, '-o', mfc='none')
    for row in rows:
        ax.plot(row['ms_quartiles'], [row['score']] * 2, color='C0', alpha=0.3)
        if row['K'] == trained:
            ax.plot(row['ms'], row['score'], 'o', color='C0')
        ax.annotate(
            f'K = {row["K"]}',
            (row['ms'], row['score']),
            textcoords='offset points',
            xytext=(5, -12),
        )
    ax.set(xlabel='backbone, ms a picture', ylabel=f'{metric}, one training')
    ax.set_xlim(0, 1.2 * max(row['ms_quartiles'][1] for row in rows))
    ax.margins(y=0.15)
    ax.grid(alpha=0.3)
    figure.tight_layout()
    with whole_file(file) as part:
        figure.savefig(part, dpi=80)
    pyplot.close(figure)


def main() -> None:
    """Evaluate, time and write."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='of a model whose backbone is a DGT')
    parser.add_argument(
        '--num-keys', nargs='+', type=int, default=[16, 32, 64, 98, 196, 392]
    )
    parser.add_argument('--metric', default='mIoU', help='as the evaluator names it')
    parser.add_argument('--rounds', type=int, default=15, help='times each is timed')
    add_out(parser, Path('docs/comparisons/keys'), 'path without suffix')
    args = parser.parse_args()
    out = find_out(parser, args)
    cfg = load_config(args)
    check_data(cfg, 'test_dataloader')
    cfg.load_from, cfg.resume = args.checkpoint, False  # by the first evaluation
    runner = build_runner(cfg)
    trained = cfg.model.backbone.get('num_keys')
    rows = sweep(runner, args.metric, [*sorted(args.num_keys), ALL], args.rounds)
    about = machine('cuda' if torch.cuda.is_available() else 'cpu')
    save(Path(f'{out}.json'), dict(about, trained_with=trained), results=rows)
    plot(Path(f'{out}.png'), args.metric, rows, trained)
    print(f'{out}.json')


if __name__ == '__main__':
    run_command(main)
