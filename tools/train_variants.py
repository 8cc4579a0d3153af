"""Train the variants of a config under one recipe, from several seeds, and compare.

    python tools/train_variants.py configs/comparisons/camvid.py
    python tools/train_variants.py configs/dgt_ablation_demo.py --out docs/ablations

Variants are whatever differs in settings: backbones on pictures of one's own, as in
configs/comparisons, or the paper's ablations in miniature. Where the config has
``learning_rates``, every variant first takes a shorter trial with each, from a seed of
its own, and keeps the better one.

Every run is a process of its own and leaves result.json in its work dir, with machine,
versions and commit. It is trained again only if its config or the package changed
since, so a call that ended early goes on where it stopped, and several processes may
share the runs, each with --variants of its own, or with --seeds where there are no
trials; another call then makes the table.
"""

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from heads import fit_heads
from measure import (
    add_out,
    find_out,
    in_fresh_process,
    machine,
    output_folder,
    resident_bytes,
    save,
)
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn

import mmdgt
from mmdgt.commands import run_command
from mmdgt.files import whole_file, write_json, write_text
from mmdgt.openmmlab.apis.config import check_data, load_config, make_parser
from mmdgt.openmmlab.apis.runner import build_runner
from mmdgt.openmmlab.engine.flops import count_flops

CONFIGS = Path(__file__).parents[1] / 'configs'
TRIAL_SEED = 1000  # of no run in the table


class Stopwatch(Hook):
    """Seconds and CPU seconds of the training alone, and its peak memory."""

    def before_train(self, runner: Runner) -> None:
        """Start."""
        self.started = time.perf_counter(), time.process_time()

    def before_val(self, runner: Runner) -> None:
        """Stop, before the evaluation that ends the training."""
        wall, cpu = self.started
        self.seconds = time.perf_counter() - wall
        self.cpu_seconds = time.process_time() - cpu
        self.peak = peak_memory()


def peak_memory() -> int:
    """Bytes: what PyTorch allocated on the GPU, or else the resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident_bytes('VmHWM')


def configure(
    args: argparse.Namespace,
    name: str,
    seed: int,
    learning_rate: float | None = None,
    trial: bool = False,
) -> Config:
    """The config of one run.

    Args:
        args (Namespace): Of the command.
        name (str): The variant.
        seed (int): Of the run.
        learning_rate (float, optional): Instead of the recipe's.
        trial (bool): Whether the run only tries a learning rate.
    """
    cfg = load_config(args)
    variant = cfg.pop('variants')[name]
    rates = cfg.pop('learning_rates', None)
    cfg.pop('reference', None)
    cfg.logged = cfg.pop('comparison').get('logged', ())
    cfg.merge_from_dict(variant.get('settings', {}))
    fit_heads(cfg)
    cfg.randomness = dict(seed=seed)
    if learning_rate:
        cfg.optim_wrapper.optimizer.lr = learning_rate
    iterations = args.iterations or cfg.train_cfg.max_iters
    if trial:
        iterations = round(iterations * rates.share)
    cfg.train_cfg.max_iters = cfg.train_cfg.val_interval = iterations
    cfg.param_scheduler[-1].end = iterations
    run = f'lr_{learning_rate:g}' if trial else f'seed_{seed}'
    cfg.log_level = 'WARNING'  # the losses go to vis_data/scalars.json
    cfg.work_dir = str(Path(cfg.work_dir, name, run))
    cfg.experiment_name = f'{name}_{run}'
    return cfg


def identity(cfg: Config) -> dict:
    """What a result depends on: the config, and the package with its binary."""
    text = json.dumps(cfg.to_dict(), sort_keys=True, default=str)
    package = hashlib.sha256()
    for file in sorted(Path(mmdgt.__file__).parent.rglob('*')):
        if file.suffix in ('.py', '.so'):
            package.update(file.read_bytes())
    return dict(
        config=hashlib.sha256(text.encode()).hexdigest()[:12],
        package=package.hexdigest()[:12],
    )


def read(file: Path, cfg: Config) -> dict | None:
    """The result of a finished run, if this very config and package gave it."""
    if file.is_file():
        result = json.loads(file.read_text())
        if identity(cfg).items() <= result.items():
            return result
    return None


def train(cfg: Config, metric: str) -> dict:
    """Train and evaluate once, in a process that does nothing else."""
    MMLogger.get_current_instance().setLevel('ERROR')
    about, before = identity(cfg), peak_memory()
    runner = build_runner(cfg)
    watch = Stopwatch()
    runner.register_hook(watch, 'LOWEST')
    runner.train()
    return dict(
        about,
        seed=cfg.randomness.seed,
        learning_rate=cfg.optim_wrapper.optimizer.lr,
        iterations=runner.iter,
        score=round(runner.message_hub.get_scalar(f'val/{metric}').current(), 2),
        logged=last_line(runner, cfg.logged),
        seconds=round(watch.seconds, 1),
        cpu_seconds=round(watch.cpu_seconds, 1),
        peak_bytes=watch.peak - before,
        machine=machine('cuda' if torch.cuda.is_available() else 'cpu'),
    )


def last_line(runner: Runner, names: Sequence[str]) -> dict[str, float]:
    """Values of the last line of the training log, of those that are in it."""
    scalars = runner.message_hub.log_scalars
    return {
        name: round(scalars[f'train/{name}'].current(), 4)
        for name in names
        if f'train/{name}' in scalars
    }


def result_of(cfg: Config, metric: str) -> dict:
    """The result of a run: that which is there, or a new one."""
    file = Path(cfg.work_dir, 'result.json')
    result = read(file, cfg)
    state = 'was there already' if result else 'trained'
    if not result:
        result = in_fresh_process(train, cfg, metric)
        write_json(file, result)
    print(
        f'{cfg.experiment_name}: {metric} {result["score"]},'
        f' {result["seconds"]} s, {state}',
        flush=True,
    )
    return result


def best_rates(args: argparse.Namespace, names: list[str]) -> dict[str, list[dict]]:
    """The trials of every variant, the best first; none if the recipe has a rate."""
    cfg = load_config(args)
    trials: dict[str, list[dict]] = {name: [] for name in names}
    for rate in cfg.get('learning_rates', {}).get('tried', ()):
        for name in names:
            run = configure(args, name, TRIAL_SEED, rate, trial=True)
            trials[name].append(result_of(run, cfg.comparison.metric))
    for results in trials.values():
        results.sort(key=lambda result: -result['score'])
    return trials


def on_meta(cfg: Config) -> nn.Module:
    """The model of a config without values, of which sizes are counted."""
    init_default_scope(cfg.default_scope)
    return revert_sync_batchnorm(MODELS.build(cfg.model)).to('meta').eval()


def sizes(cfg: Config, size: tuple[int, int]) -> dict:
    """Parameters (M) and FLOPs (G) of a model at (height, width)."""
    model = on_meta(cfg)
    flops = sum(count_flops(model, *size).values())
    params = sum(p.numel() for p in model.parameters())
    return dict(params=round(params / 1e6, 2), flops=round(flops / 1e9, 3))


def summarise(
    cfg: Config, run: Config, name: str, trials: list[dict], runs: list[dict]
) -> dict:
    """A row of the table.

    Args:
        cfg (Config): With all variants.
        run (Config): Of one of the runs.
        name (str): The variant.
        trials (list): Of its learning rates.
        runs (list): Its results.
    """
    variant, scores = cfg.variants[name], [result['score'] for result in runs]
    row = dict(variant=name, title=variant.title)
    if 'reference' in cfg:
        known = Config.fromfile(CONFIGS / cfg.reference.config)
        known.merge_from_dict(dict(model=dict(backbone=variant.get('reference', {}))))
        row['reference'] = sizes(known, cfg.reference.size)
        row['reference']['published'] = variant.get('published')

    def per_iteration(what: str) -> float:
        return round(statistics.median(x[what] / x['iterations'] for x in runs), 3)

    return row | dict(
        here=sizes(run, cfg.comparison.size),
        learning_rate=runs[0]['learning_rate'],
        iterations=runs[0]['iterations'],
        mean=round(statistics.mean(scores), 2),
        spread=round(statistics.stdev(scores), 2) if scores[1:] else None,
        seconds=per_iteration('seconds'),
        cpu_seconds=per_iteration('cpu_seconds'),
        peak_bytes=max(result['peak_bytes'] for result in runs),
        logged={
            key: round(statistics.mean(result['logged'][key] for result in runs), 3)
            for key in runs[0]['logged']
        },
        runs=runs,
        trials=trials,
    )


def write_markdown(out: Path, cfg: Config, rows: list[dict]) -> None:
    """The table, beside the JSON and the plot of that name."""
    metric = cfg.comparison.title
    columns = ['variant']
    if 'reference' in cfg:
        title = cfg.reference.title
        columns += [f'params (M), {title}', f'FLOPs (G), {title}']
        columns += [f'{metric}, published']
    columns += ['params (M)', 'FLOPs (G)', 'learning rate', metric, 'spread', 'by seed']
    columns += ['s / iteration', 'CPU s / iteration', 'peak memory (MiB)']
    logged = cfg.comparison.get('logged', ())
    columns += [f'last {name}' for name in logged]
    lines = ['| ' + ' | '.join(columns) + ' |', '|' + ' --- |' * len(columns)]
    for row in rows:
        cells = (
            row['title'],
            *row.get('reference', {}).values(),
            *row['here'].values(),
            f'{row["learning_rate"]:g}',
            row['mean'],
            row['spread'],
            ', '.join(str(run['score']) for run in row['runs']),
            row['seconds'],
            row['cpu_seconds'],
            round(row['peak_bytes'] / 2**20),
            *map(row['logged'].get, logged),
        )
        shown = ('-' if cell is None else str(cell) for cell in cells)
        lines.append(f'| {" | ".join(shown)} |')
    iterations, seeds = rows[0]['iterations'], len(rows[0]['runs'])
    height, width = cfg.comparison.size
    notes = f"""# {cfg.comparison.heading}

Written by `python tools/train_variants.py`: {iterations} iterations from each of
{seeds} seeds. The spread is the sample standard deviation over the seeds. FLOPs are of
one picture of {height}x{width} (height, width); one multiply-add counts once. Times are
those of the training alone, the median over the seeds, and include what else the
machine did, the CPU seconds less of it; memory is what the largest run added to its
process. `{out.name}.json` has every run with its machine, versions and commit.
"""
    if rows[0]['trials']:
        tried = ', '.join(f'{x["learning_rate"]:g}' for x in rows[0]['trials'])
        notes += f"""
Every variant has the learning rate, of {tried}, that scored better in
{rows[0]['trials'][0]['iterations']} iterations from another seed.
"""
    picture = f'![{cfg.comparison.title} of every seed]({out.name}.png)\n'
    write_text(f'{out}.md', '\n'.join((notes, picture, *lines)) + '\n')


def plot(file: Path, title: str, rows: list[dict]) -> None:
    """The score of every run as a dot, their means as lines."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7, 0.5 * len(rows) + 1))
    for y, row in enumerate(rows):
        scores = [run['score'] for run in row['runs']]
        ax.plot(scores, [y] * len(scores), 'o', mfc='none', mec='C0')
        ax.plot([row['mean']] * 2, [y - 0.3, y + 0.3], color='C1', lw=3)
    ax.set_yticks(range(len(rows)), [row['title'] for row in rows])
    ax.invert_yaxis()
    ax.set(xlabel=f'{title}: every seed, and their mean')
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
    add_out(
        parser,
        Path('docs/comparisons'),
        'folder; its files have the name of the config',
        output_folder,
    )
    args = parser.parse_args()
    cfg = load_config(args)
    if 'variants' not in cfg:
        parser.error(f'{args.config} has no variants; see configs/comparisons')
    names = args.variants or list(cfg.variants)
    unknown = sorted(set(names) - cfg.variants.keys())
    if unknown:
        parser.error(
            f'--variants: expected some of {list(cfg.variants)}, the variants of'
            f' {args.config}, got {unknown}'
        )
    args.committed /= Path(args.config).stem
    out = find_out(parser, args)
    if args.out:
        out /= Path(args.config).stem
    check_data(cfg, 'train_dataloader', 'val_dataloader')
    trials = best_rates(args, names)
    results: dict[str, list[dict]] = {name: [] for name in names}
    for seed in args.seeds:  # so that an early end leaves all variants alike
        for name in names:
            rate = trials[name][0]['learning_rate'] if trials[name] else None
            run = configure(args, name, seed, rate)
            results[name].append(result_of(run, cfg.comparison.metric))
    rows = [
        summarise(cfg, configure(args, name, 0), name, trials[name], results[name])
        for name in names
    ]
    about = machine('cuda' if torch.cuda.is_available() else 'cpu')
    # Not with_suffix: a config may be called v1.5.py.
    save(Path(f'{out}.json'), about, results=rows)
    write_markdown(out, cfg, rows)
    plot(Path(f'{out}.png'), cfg.comparison.title, rows)
    print(f'{out}.md')


if __name__ == '__main__':
    run_command(main)
