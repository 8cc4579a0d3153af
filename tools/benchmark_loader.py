"""How many pictures a second one core loads for training, and what takes its time.

    python tools/benchmark_loader.py configs/upernet_dgt_t_ade20k.py

Loads training samples through the config's pipeline in one thread, as a worker of a
data loader does. A training that takes R pictures a second needs R divided by this rate
of cores, beside those of its own processes.
"""

import time
from collections.abc import Callable
from typing import Any

import cv2
import torch
from measure import machine, output_file, print_columns, save, summary
from mmengine.registry import DATASETS, init_default_scope

from mmdgt.commands import run_command
from mmdgt.openmmlab.apis.config import check_data, load_config, make_parser
from mmdgt.openmmlab.engine.resume import seeded


def watched(step: Callable, seconds: dict[str, float]) -> Callable:
    """A step of a pipeline that adds up what it takes."""

    def call(sample: Any) -> Any:
        start = time.perf_counter()
        result = step(sample)
        name = type(step).__name__
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return result

    return call


def main() -> None:
    """Load, print the rate and the share of every step, and write them."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument('--samples', type=int, default=100, help='of a round')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--out', type=output_file, help='JSON file of the rates')
    args = parser.parse_args()
    cfg = load_config(args)
    check_data(cfg, 'train_dataloader')
    init_default_scope(cfg.default_scope)
    cv2.setNumThreads(0)  # as in the workers
    torch.set_num_threads(1)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    dataset = getattr(dataset, 'datasets', [dataset])[0]  # of several the first
    parts: dict[str, float] = {}
    steps = dataset.pipeline.transforms
    dataset.pipeline.transforms = [watched(step, parts) for step in steps]
    rates = []
    for number in range(args.rounds + 1):
        if number == 1:  # the first round warms up
            parts.clear()
        start = time.perf_counter()
        for place in range(args.samples):
            with seeded(number, place):
                dataset[place % len(dataset)]
        rates.append(args.samples / (time.perf_counter() - start))
    row = {'config': args.config, 'samples': args.samples}
    row |= summary(sorted(rates[1:]), 'pictures_per_s', 1)
    total = sum(parts.values())
    shares = {name: round(100 * took / total) for name, took in parts.items()}
    print(f'{row["pictures_per_s"]} pictures a second and core')
    print_columns([['step', '%'], *([name, str(x)] for name, x in shares.items())])
    if args.out:
        save(args.out, machine('cpu'), results=[row | {'share_percent': shares}])


if __name__ == '__main__':
    run_command(main)
