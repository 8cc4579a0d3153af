"""Sum up the demo: both scores, the share of live groups, a picture of the result.

``python tools/demo_report.py CONFIG CHECKPOINT`` after ``tools/test.py`` has written
its metrics beside the checkpoint, with and without ``--tta``.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from benchmark_op import machine
from mmengine.config import Config
from mmseg.apis import inference_model, init_model

import mmdgt
from mmdgt.engine import group_usage
from mmdgt.models import DynamicGroupAttention

ROWS = 4
GAP = 6  # pixels between the panels
SCALE = 2


def paint(labels: np.ndarray, palette: list) -> np.ndarray:
    """Colour a label map (H, W); what is unlabelled (255) stays black. BGR."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    return colours[labels][..., ::-1]


def panel(image: np.ndarray) -> np.ndarray:
    """Enlarge a picture and put a white edge around it."""
    size = [SCALE * side for side in image.shape[1::-1]]
    large = cv2.resize(image, size, interpolation=cv2.INTER_NEAREST)
    return cv2.copyMakeBorder(
        large, *4 * [GAP // 2], cv2.BORDER_CONSTANT, None, [255] * 3
    )


def caption(width: int) -> np.ndarray:
    """The heading of the columns, (30, 3 * width, 3)."""
    strip = np.full((30, 3 * width, 3), 255, np.uint8)
    for i, text in enumerate(('image', 'truth', 'prediction')):
        where = (i * width + GAP, 21)
        cv2.putText(
            strip, text, where, cv2.FONT_HERSHEY_SIMPLEX, 0.6, 0, 1, cv2.LINE_AA
        )
    return strip


def main() -> None:
    """Predict the validation pictures, draw the first of them, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config')
    parser.add_argument('checkpoint', type=Path)
    args = parser.parse_args()
    cfg = Config.fromfile(args.config)
    work_dir = args.checkpoint.parent
    model = init_model(cfg, str(args.checkpoint), device='cpu')
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, DynamicGroupAttention)
    }
    for layer in layers.values():
        layer.train()  # so that it counts its groups
    counts = {name: 0 for name in layers}

    rows = []
    data_root = Path(cfg.data_root)
    pictures = sorted((data_root / 'images/validation').glob('*.jpg'))
    for number, path in enumerate(pictures):
        prediction = inference_model(model, str(path)).pred_sem_seg.data[0].numpy()
        counts = {name: counts[name] + layers[name].group_counts for name in layers}
        if number < ROWS:
            truth = data_root / 'annotations/validation' / f'{path.stem}.png'
            # Labels in the file count from 1, 0 is unlabelled and becomes 255.
            truth = cv2.imread(str(truth), cv2.IMREAD_GRAYSCALE) - np.uint8(1)
            maps = [paint(labels, cfg.palette) for labels in (truth, prediction)]
            rows.append(np.hstack([panel(p) for p in (cv2.imread(str(path)), *maps)]))
    picture = work_dir / 'predictions.png'
    cv2.imwrite(str(picture), np.vstack([caption(rows[0].shape[1] // 3), *rows]))

    live = [group_usage(torch.as_tensor(count))[0] for count in counts.values()]
    single, multi = (
        json.loads((work_dir / name).read_text())['mIoU']
        for name in ('metrics.json', 'metrics_tta.json')
    )
    report = {
        'mIoU, single-scale': round(single, 2),
        'mIoU, multi-scale': round(multi, 2),
        'live groups of the worst block, %': round(100 * min(live), 1),
        'checkpoint': str(args.checkpoint),
        'picture': str(picture),
    }
    saved = {**report, 'mmdgt': mmdgt.__version__, 'machine': machine('cpu')}
    (work_dir / 'report.json').write_text(json.dumps(saved, indent=2) + '\n')
    for what, value in report.items():
        print(f'{what + ":":36}{value}')


if __name__ == '__main__':
    main()
