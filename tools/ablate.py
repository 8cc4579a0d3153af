"""Ablations of the paper's table 4(b) and (c), and of eq. 4, in miniature.

Trains every variant of a config, such as configs/dgt_ablation_demo.py, from several
seeds for equal iterations, and writes ablations.json, .md and .png. A finished run
stays in the work dir as result.json and is not trained again, so several processes may
share the runs, each with --seeds or --variants of its own; another call then makes the
table of them all.
"""

import argparse
import hashlib
import json
import statistics
import time
from pathlib import Path

import torch
from measure import add_out, find_out, machine, save
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import mmdgt  # noqa: F401
from mmdgt.commands import run_command
from mmdgt.files import whole_file, write_json, write_text
from mmdgt.openmmlab.apis.config import check_data, load_config, make_parser
from mmdgt.openmmlab.apis.runner import build_runner
from mmdgt.openmmlab.engine.flops import count_flops

PAPER = Path(__file__).parents[1] / 'configs/dgt_t_in1k.py', 224  # config, image size
COLUMNS = (
    'variant',
    'params (M), DGT-T',
    'FLOPs (G), DGT-T',
    'top-1, paper',
    'params (M), here',
    'FLOPs (G), here',
    'top-1, here',
    'spread',
    'by seed',
)


def configure(args: argparse.Namespace, name: str, seed: int) -> Config:
    """The config of one run."""
    cfg = load_config(args)
    variant = cfg.pop('variants')[name]
    cfg.merge_from_dict(dict(model=dict(backbone=variant.get('backbone', {}))))
    hook = next(hook for hook in cfg.custom_hooks if hook.type == 'CentroidHook')
    hook.update(variant.get('centroid_hook', {}))
    cfg.randomness.seed = seed
    if args.iterations:
        cfg.train_cfg.max_iters = cfg.train_cfg.val_interval = args.iterations
        cfg.param_scheduler[-1].end = args.iterations
    cfg.log_level = 'WARNING'  # the losses go to vis_data/scalars.json
    cfg.work_dir = str(Path(cfg.work_dir, name, f'seed_{seed}'))
    cfg.experiment_name = f'{name}_{seed}'
    return cfg


def read(file: Path, cfg: Config) -> dict | None:
    """The result of a finished run, if it had this very config."""
    if file.is_file():
        result = json.loads(file.read_text())
        if result['config'] == fingerprint(cfg):
            return result
    return None


def fingerprint(cfg: Config) -> str:
    """Tells configs apart."""
    text = json.dumps(cfg.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def train(cfg: Config) -> dict:
    """Train and evaluate once."""
    config, start = fingerprint(cfg), time.perf_counter()
    runner = build_runner(cfg)
    runner.train()
    for handler in runner.logger.handlers[:]:  # the run's log file among them
        runner.logger.removeHandler(handler)
        handler.close()
    return dict(
        config=config,
        seed=cfg.randomness.seed,
        iterations=runner.iter,
        top1=round(runner.message_hub.get_scalar('val/accuracy/top1').current(), 2),
        seconds=round(time.perf_counter() - start, 1),
    )


def sizes(cfg: Config, image_size: int) -> tuple[float, float]:
    """Parameters (M) and FLOPs (G) of a classifier."""
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model).eval()
    flops = sum(count_flops(model, image_size, image_size).values())
    params = sum(p.numel() for p in model.parameters())
    return round(params / 1e6, 2), round(flops / 1e9, 3)


def summarise(cfg: Config, name: str, variant: dict, runs: list[dict]) -> dict:
    """A row of the table: sizes, published top-1, own top-1 and its spread."""
    file, image_size = PAPER
    paper = Config.fromfile(file)
    paper.merge_from_dict(dict(model=dict(backbone=variant.get('dgt_t', {}))))
    params, flops = sizes(paper, image_size)
    here = next(step.scale for step in cfg.test_pipeline if 'scale' in step)
    params_here, flops_here = sizes(cfg, here)
    top1 = [run['top1'] for run in runs]
    return dict(
        variant=name,
        title=variant['title'],
        iterations=runs[0]['iterations'],
        dgt_t=dict(params=params, flops=flops, published=variant.get('published')),
        here=dict(params=params_here, flops=flops_here),
        mean=round(statistics.mean(top1), 2),
        spread=round(statistics.stdev(top1), 2) if top1[1:] else None,
        runs=runs,
    )


def write_markdown(file: Path, rows: list[dict]) -> None:
    """The table."""
    lines = ['| ' + ' | '.join(COLUMNS) + ' |', '|' + ' --- |' * len(COLUMNS)]
    for row in rows:
        cells = (
            row['title'],
            *row['dgt_t'].values(),
            *row['here'].values(),
            row['mean'],
            row['spread'],
            ', '.join(str(run['top1']) for run in row['runs']),
        )
        text = ('-' if cell is None else str(cell) for cell in cells)
        lines.append(f'| {" | ".join(text)} |')
    iterations, seeds = rows[0]['iterations'], len(rows[0]['runs'])
    write_text(
        file,
        f"""# Ablations in miniature

Written by `python tools/ablate.py`: {iterations} iterations from each of {seeds} seeds.
The spread is the sample standard deviation over the seeds. "DGT-T" is at 224x224 as in
the paper, "here" the small network that was trained; one multiply-add counts once.
[What this can say](../ablations.md).

![](ablations.png)

"""
        + '\n'.join(lines)
        + '\n',
    )


def plot(file: Path, rows: list[dict]) -> None:
    """The top-1 of every run as a dot, their means as lines."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7, 0.5 * len(rows) + 1))
    for y, row in enumerate(rows):
        top1 = [run['top1'] for run in row['runs']]
        ax.plot(top1, [y] * len(top1), 'o', mfc='none', mec='C0')
        ax.plot([row['mean']] * 2, [y - 0.3, y + 0.3], color='C1', lw=3)
    ax.set_yticks(range(len(rows)), [row['title'] for row in rows])
    ax.invert_yaxis()
    ax.set(xlabel='top-1 (%): every seed, and their mean')
    ax.grid(axis='x', alpha=0.3)
    figure.tight_layout()
    with whole_file(file) as part:
        figure.savefig(part, dpi=80)
    pyplot.close(figure)


def main() -> None:
    """Train what is missing, then write what is there."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument(
        '--variants', nargs='+', metavar='NAME', help='of the config; all by default'
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--iterations', type=int, help='of a run; the config has some')
    add_out(parser, Path('docs/ablations'), 'folder')
    args = parser.parse_args()
    out = find_out(parser, args)
    cfg = load_config(args)
    check_data(cfg, 'train_dataloader', 'val_dataloader')
    variants = cfg.get('variants', {})
    unknown = set(args.variants or ()) - variants.keys()
    if unknown or not variants:
        parser.error(
            f'--variants: expected some of {list(variants)}, the variants of'
            f' {args.config}, got {sorted(unknown)}'
        )
    names = args.variants or list(variants)
    # Seed by seed, so that an early end leaves all variants alike.
    todo = [(name, seed) for seed in args.seeds for name in names]
    results = {name: [] for name in names}
    for number, (name, seed) in enumerate(todo, 1):
        run = configure(args, name, seed)
        file = Path(run.work_dir, 'result.json')
        print(f'[{number}/{len(todo)}] {name}, seed {seed}', flush=True)
        result = read(file, run)
        state = 'was there already' if result else 'trained'
        if not result:
            result = train(run)
            write_json(file, result)
        results[name].append(result)
        print(f'  top-1 {result["top1"]} %, {result["seconds"]} s, {state}', flush=True)
    rows = [
        summarise(configure(args, name, 0), name, variants[name], results[name])
        for name in names
    ]
    save(out / 'ablations.json', machine('cpu'), results=rows)
    write_markdown(out / 'ablations.md', rows)
    plot(out / 'ablations.png', rows)
    print(f'{out}/ablations.md')


if __name__ == '__main__':
    run_command(main)
