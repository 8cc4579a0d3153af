"""Sum up a demo: its scores, the share of live groups, a picture of the result.

``python tools/demo_report.py CONFIG CHECKPOINT`` after ``tools/test.py`` has written
its metrics beside the checkpoint, with or without ``--tta``.
"""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from benchmark_op import machine
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.registry import VISUALIZERS
from mmengine.structures import BaseDataElement

import mmdgt
from mmdgt.engine import group_usage
from mmdgt.engine.config import load_config, make_parser
from mmdgt.engine.runner import build_runner
from mmdgt.models import DynamicGroupAttention

Predict = Callable[[dict], BaseDataElement]  # an item of the data set, with results
ROWS = 4
GAP = 6  # pixels between the panels
SCALE = 3  # of the picture over the scenes
SCORES = {
    'mmseg': {'mIoU': 'mIoU'},
    'mmdet': {'coco/bbox_mAP_50': 'box AP50', 'coco/segm_mAP_50': 'mask AP50'},
    'mmpretrain': {'accuracy/top1': 'top-1'},
}
METRICS = {'metrics.json': 'single-scale', 'metrics_tta.json': 'multi-scale'}


def enlarge(image: np.ndarray) -> np.ndarray:
    """Enlarge a picture (H, W, 3) without blurring its pixels."""
    return mmcv.imrescale(image, SCALE, interpolation='nearest')


def frame(image: np.ndarray) -> np.ndarray:
    """Put a white edge around a panel."""
    return cv2.copyMakeBorder(
        image, *4 * [GAP // 2], cv2.BORDER_CONSTANT, None, [255] * 3
    )


def captioned(rows: list[np.ndarray], titles: tuple[str, ...]) -> np.ndarray:
    """Rows of panels below the titles of their columns."""
    width = rows[0].shape[1]
    strip = np.full((30, width, 3), 255, np.uint8)
    for i, text in enumerate(titles):
        where = (i * width // len(titles) + GAP, 21)
        cv2.putText(
            strip, text, where, cv2.FONT_HERSHEY_SIMPLEX, 0.6, 0, 1, cv2.LINE_AA
        )
    return np.vstack([strip, *rows])


def paint(labels: torch.Tensor, palette: list) -> np.ndarray:
    """Colour a label map (1, H, W); what is unlabelled (255) stays black. BGR."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    return colours[labels[0].numpy()][..., ::-1]


def draw_segmentation(dataset: BaseDataset, predict: Predict) -> np.ndarray:
    """Image, truth and prediction of the first scenes."""
    palette = dataset.metainfo['palette']
    rows = []
    for index in range(min(ROWS, len(dataset))):
        sample = predict(item := dataset[index])
        image = item['inputs'].permute(1, 2, 0).numpy()
        maps = (sample.gt_sem_seg.data, sample.pred_sem_seg.data)
        panels = [image, *(paint(labels, palette) for labels in maps)]
        rows.append(np.hstack([frame(enlarge(panel)) for panel in panels]))
    return captioned(rows, ('image', 'truth', 'prediction'))


def draw_detection(dataset: BaseDataset, predict: Predict) -> np.ndarray:
    """Image, true boxes and masks, predicted ones, of the first scenes."""
    visualizer = VISUALIZERS.build(dict(type='DetLocalVisualizer', name='demo'))
    visualizer.dataset_meta = dataset.metainfo
    rows = []
    for index in range(min(ROWS, len(dataset))):
        item = dataset[index]
        image = enlarge(mmcv.imread(item['data_samples'].img_path))
        # Taken for the original, so that boxes and masks come out at its size.
        factor = image.shape[0] / item['data_samples'].img_shape[0]
        truth = item['data_samples'].gt_instances
        truth.bboxes.rescale_((SCALE, SCALE))
        truth.masks = truth.masks.rescale(SCALE)
        item['data_samples'].set_metainfo(
            dict(ori_shape=image.shape[:2], scale_factor=(1 / factor, 1 / factor))
        )
        sample = predict(item)
        panels = [image]
        for drawn in (dict(draw_pred=False), dict(draw_gt=False)):
            visualizer.add_datasample('', image[..., ::-1], sample, **drawn)
            panels.append(visualizer.get_image()[..., ::-1])
        rows.append(np.hstack([frame(panel) for panel in panels]))
    return captioned(rows, ('image', 'truth', 'prediction'))


def draw_classification(dataset: BaseDataset, predict: Predict) -> np.ndarray:
    """Pictures above their true and predicted class."""
    classes = dataset.metainfo['classes']
    panels = []
    for index in np.linspace(0, len(dataset) - 1, ROWS * ROWS).astype(int):
        item = dataset[int(index)]
        sample = predict(item)
        image = frame(enlarge(item['inputs'].permute(1, 2, 0).numpy()))
        label = np.full((24, image.shape[1], 3), 255, np.uint8)
        true, found = sample.gt_label.item(), sample.pred_label.item()
        text = classes[found] + f' (is {classes[true]})' * (true != found)
        colour = (0, 128, 0) if true == found else (0, 0, 200)
        cv2.putText(
            label,
            text,
            (GAP, 16),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.5,
            colour,
            1,
            cv2.LINE_AA,
        )
        panels.append(np.vstack([image, label]))
    return np.vstack(
        [np.hstack(panels[i : i + ROWS]) for i in range(0, len(panels), ROWS)]
    )


DRAW = {
    'mmseg': draw_segmentation,
    'mmdet': draw_detection,
    'mmpretrain': draw_classification,
}


def live_groups(
    model: torch.nn.Module, dataset: BaseDataset, predict: Predict
) -> float:
    """Share of groups that get a query of the data set, in the worst layer."""
    layers = [m for m in model.modules() if isinstance(m, DynamicGroupAttention)]
    counts = [0] * len(layers)
    for layer in layers:
        layer.train()  # so that it counts its groups
    for index in range(len(dataset)):
        predict(dataset[index])
        counts = [n + m.group_counts for n, m in zip(counts, layers, strict=True)]
    for layer in layers:
        layer.eval()
    return min(group_usage(count)[0] for count in counts)


def main() -> None:
    """Predict the validation pictures, draw the first of them, print the summary."""
    parser = make_parser(__doc__)
    parser.add_argument('checkpoint', type=Path)
    args = parser.parse_args()
    args.work_dir = str(args.checkpoint.parent)
    cfg = load_config(args)
    work_dir = Path(cfg.work_dir)
    runner = build_runner(cfg)
    runner.load_checkpoint(str(args.checkpoint), strict=True)
    model = runner.model.eval()
    dataset = runner.build_dataloader(cfg.test_dataloader).dataset

    @torch.no_grad()
    def predict(item: dict) -> BaseDataElement:
        return model.test_step(pseudo_collate([item]))[0]

    picture = work_dir / 'predictions.png'
    cv2.imwrite(str(picture), DRAW[cfg.default_scope](dataset, predict))
    report = {}
    for name, how in METRICS.items():
        if (work_dir / name).is_file():
            metrics = json.loads((work_dir / name).read_text())
            for key, score in SCORES[cfg.default_scope].items():
                percent = metrics[key] * (100 if cfg.default_scope == 'mmdet' else 1)
                report[f'{score}, {how}'] = round(percent, 2)
    live = 100 * live_groups(model, dataset, predict)
    report['live groups of the worst block, %'] = round(live, 1)
    report |= {'checkpoint': str(args.checkpoint), 'picture': str(picture)}
    saved = {**report, 'mmdgt': mmdgt.__version__, 'machine': machine('cpu')}
    (work_dir / 'report.json').write_text(json.dumps(saved, indent=2) + '\n')
    for what, value in report.items():
        print(f'{what + ":":36}{value}')


if __name__ == '__main__':
    main()
