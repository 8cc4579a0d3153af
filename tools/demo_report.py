"""Sum up a demo: its scores, the share of live groups, a picture of the result.

``python tools/demo_report.py CONFIG CHECKPOINT`` after ``tools/test.py`` has written
its metrics beside the checkpoint, with or without ``--tta``.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from measure import machine
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.device import get_device
from mmengine.registry import DATASETS, init_default_scope
from mmengine.structures import BaseDataElement

import mmdgt
from mmdgt.commands import run_command
from mmdgt.files import write_json
from mmdgt.frameworks import FRAMEWORKS
from mmdgt.models import DynamicGroupAttention
from mmdgt.openmmlab.apis import pictures
from mmdgt.openmmlab.apis.config import load_config, make_parser
from mmdgt.openmmlab.apis.inference import build_model
from mmdgt.openmmlab.apis.pictures import write_picture
from mmdgt.openmmlab.engine import group_usage

METRICS = {'metrics.json': 'single-scale', 'metrics_tta.json': 'multi-scale'}


def live_groups(
    model: torch.nn.Module, dataset: BaseDataset, predict: pictures.Predict
) -> float:
    """Share of groups that get a query of the data set, in the worst layer."""
    layers = [m for m in model.modules() if isinstance(m, DynamicGroupAttention)]
    counts: list[Any] = [0] * len(layers)
    for layer in layers:
        layer.train()  # so that it counts its groups
    for index in range(len(dataset)):
        predict(dataset[index])
        counts = [n + m.group_counts for n, m in zip(counts, layers, strict=True)]
    for layer in layers:
        layer.eval()
    return min(group_usage(count)[0] for count in counts)


def minutes_of_training(work_dir: Path) -> float | None:
    """What the iterations took, by the logs of all runs; None where they have none."""
    rows = [
        json.loads(line)
        for log in sorted(work_dir.glob('*/vis_data/scalars.json'))  # by their start
        for line in log.read_text().splitlines()
    ]
    seconds = {row['step']: row['time'] for row in rows if 'loss' in row}
    if not seconds:
        return None
    return round(max(seconds) * statistics.mean(seconds.values()) / 60, 1)


def main() -> None:
    """Predict the validation pictures, draw the first of them, print the summary."""
    parser = make_parser(__doc__)
    parser.add_argument('checkpoint', type=Path)
    args = parser.parse_args()
    args.work_dir = str(args.checkpoint.parent)
    cfg = load_config(args)
    work_dir = Path(cfg.work_dir)
    init_default_scope(cfg.default_scope)
    partial = cfg.get('allow_partial', False)
    model = build_model(cfg, str(args.checkpoint), partial).to(get_device())
    dataset = DATASETS.build(cfg.test_dataloader.dataset)

    @torch.no_grad()
    def predict(item: dict) -> BaseDataElement:
        return model.test_step(pseudo_collate([item]))[0]

    picture = work_dir / 'predictions.png'
    framework = FRAMEWORKS[cfg.default_scope]
    write_picture(picture, getattr(pictures, framework.panels)(dataset, predict))
    report = {}
    for name, how in METRICS.items():
        if (work_dir / name).is_file():
            metrics = json.loads((work_dir / name).read_text())
            for key, (score, factor) in framework.scores.items():
                report[f'{score}, {how}'] = round(factor * metrics[key], 2)
    live = 100 * live_groups(model, dataset, predict)
    report['live groups of the worst block, %'] = round(live, 1)
    report['training, minutes'] = minutes_of_training(work_dir)
    report |= {'checkpoint': str(args.checkpoint), 'picture': str(picture)}
    saved = {**report, 'mmdgt': mmdgt.__version__, 'machine': machine('cpu')}
    write_json(work_dir / 'report.json', saved)
    for what, value in report.items():
        print(f'{what + ":":36}{value}')


if __name__ == '__main__':
    run_command(main)
