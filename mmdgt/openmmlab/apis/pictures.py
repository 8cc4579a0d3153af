"""Pictures of what models found: panels side by side, in rows, below titles."""

from collections.abc import Callable
from pathlib import Path

import cv2
import mmcv
import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.registry import VISUALIZERS
from mmengine.structures import BaseDataElement
from torch import Tensor

from ...files import write_bytes
from ...visualization import (
    Groups,
    draw_groups,
    draw_keys,
    draw_queries,
    group_at,
    group_statistics,
)

Predict = Callable[[dict], BaseDataElement]  # an item of the data set, with results
ROWS = 4
GAP = 6  # pixels between the panels
SCALE = 3  # of a scene in its picture
MIN_WIDTH = 320  # of a panel with groups; smaller pictures are enlarged
MARKER = (255, 255, 255)
LARGEST = 3  # groups that are drawn if none is picked
TITLES = ('image', 'ground truth', 'prediction')
SURE = 0.5  # score of a box that is drawn, at least


def write_picture(path: str | Path, image: np.ndarray) -> None:
    """Write a picture (H, W, 3) BGR in the format of its name, whole or not at all.

    Raises:
        OSError: If it can't be written.
        ValueError: If OpenCV knows no such format.
    """
    path = Path(path)
    if not path.suffix or not cv2.haveImageWriter(path.name):
        raise ValueError(
            f'expected a picture that OpenCV writes, such as .png or .jpg, got {path}'
        )
    whole, content = cv2.imencode(path.suffix, image)
    if not whole:
        raise OSError(f'OpenCV could not encode {path}')
    write_bytes(path, content.tobytes())


def enlarge(image: np.ndarray) -> np.ndarray:
    """Enlarge a picture (H, W, 3) without blurring its pixels."""
    return mmcv.imrescale(image, SCALE, interpolation='nearest')


def frame(image: np.ndarray) -> np.ndarray:
    """Put a white edge around a panel."""
    edge = GAP // 2
    return np.pad(image, ((edge, edge), (edge, edge), (0, 0)), constant_values=255)


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


def paint(labels: Tensor, palette: list) -> np.ndarray:
    """Colour a label map (1, H, W); what is unlabelled (255) stays black. BGR."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    return colours[labels[0].numpy()][..., ::-1]


def segmentation_panels(dataset: BaseDataset, predict: Predict) -> np.ndarray:
    """Image, ground truth and prediction of the first scenes."""
    palette = dataset.metainfo['palette']
    rows = []
    for index in range(min(ROWS, len(dataset))):
        sample = predict(item := dataset[index])
        image = item['inputs'].permute(1, 2, 0).numpy()
        maps = (sample.gt_sem_seg.data, sample.pred_sem_seg.data)
        panels = [image, *(paint(labels, palette) for labels in maps)]
        rows.append(np.hstack([frame(enlarge(panel)) for panel in panels]))
    return captioned(rows, TITLES)


def detection_panels(dataset: BaseDataset, predict: Predict) -> np.ndarray:
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
        for drawn in (dict(draw_pred=False), dict(draw_gt=False, pred_score_thr=SURE)):
            visualizer.add_datasample('', image[..., ::-1], sample, **drawn)
            panels.append(visualizer.get_image()[..., ::-1])
        rows.append(np.hstack([frame(panel) for panel in panels]))
    return captioned(rows, TITLES)


def classification_panels(dataset: BaseDataset, predict: Predict) -> np.ndarray:
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


def group_panels(
    image: np.ndarray,
    groups: Groups,
    pixels: list[tuple[int, int]],
    picked: list[int],
) -> np.ndarray:
    """All groups, the queries of one and its keys, side by side.

    Args:
        image (ndarray): (H, W, 3) uint8, RGB.
        groups (Groups): What a head chose for it.
        pixels (list[tuple[int, int]]): (x, y); each gets a row, with its group.
        picked (list[int]): Groups; each gets a row. The largest if both are empty.

    Returns:
        ndarray: (H', W', 3) uint8, RGB.

    Raises:
        ValueError: If there is no such pixel or group.
    """
    rows: list[tuple[int, tuple[int, int] | None]]
    rows = [(group_at(image, groups, x, y), (x, y)) for x, y in pixels]
    rows += [(group, None) for group in picked]
    if not rows:
        largest = np.argsort(group_statistics(groups)['group_sizes'])[::-1]
        rows = [(int(group), None) for group in largest[:LARGEST]]
    factor = max(1, -(-MIN_WIDTH // image.shape[1]))
    drawn = []
    for group, pixel in rows:
        panels = [
            mmcv.imrescale(panel, factor, interpolation='nearest')
            for panel in (
                draw_groups(image, groups),
                draw_queries(image, groups, group),
                draw_keys(image, groups, group),
            )
        ]
        if pixel:
            centre = [factor * side + factor // 2 for side in pixel]
            for panel in panels:
                cv2.drawMarker(panel, centre, MARKER, cv2.MARKER_CROSS, 18, 2)
        drawn.append(np.hstack([frame(panel) for panel in panels]))
    return captioned(drawn, ('all groups', 'queries of a group', 'its keys'))
