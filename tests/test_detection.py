"""Merging the views of an image, against results that are known."""

import pytest
import torch

pytest.importorskip('mmdet')
from mmdet.structures import DetDataSample
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmdgt.openmmlab.detection import InstanceTTAModel

H, W = 20, 30


class Detector(torch.nn.Module):
    """Finds in a batch of views what is given as the batch."""

    def test_step(self, data):
        return data


def boxes_to_masks(boxes):
    masks = torch.zeros(len(boxes), H, W, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = True
    return masks


def view(boxes, scores, labels, masks=None, flip=None):
    """What a detector says of a view, boxes and masks in the view's own frame."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    sample = DetDataSample(
        metainfo=dict(
            ori_shape=(H, W), img_id=7, flip=flip is not None, flip_direction=flip
        )
    )
    sample.pred_instances = InstanceData(
        bboxes=boxes,
        scores=torch.tensor(scores, dtype=torch.float32),
        labels=torch.tensor(labels, dtype=torch.long),
        masks=boxes_to_masks(boxes) if masks is None else masks,
    )
    return sample


def merge(*views, max_per_img=100):
    init_default_scope('mmdet')
    nms = dict(type='nms', iou_threshold=0.5)
    model = InstanceTTAModel(
        module=Detector(), tta_cfg=dict(nms=nms, max_per_img=max_per_img)
    )
    (merged,) = model.test_step([views])
    return merged


@pytest.mark.parametrize(
    ('flip', 'there'),
    [
        ('horizontal', [[20, 3, 28, 11]]),
        ('vertical', [[2, 9, 10, 17]]),
        ('diagonal', [[20, 9, 28, 17]]),
    ],
)
def test_a_flipped_view_is_turned_back(flip, there):
    merged = merge(
        view([[2, 3, 10, 11]], [0.5], [1]), view(there, [0.9], [1], flip=flip)
    )
    assert merged.img_id == 7
    found = merged.pred_instances
    torch.testing.assert_close(found.bboxes, torch.tensor([[2.0, 3.0, 10.0, 11.0]]))
    torch.testing.assert_close(found.scores, torch.tensor([0.9]))
    assert torch.equal(found.masks, boxes_to_masks(torch.tensor([[2, 3, 10, 11]])))


def test_masks_are_voted_on_by_score():
    box = [[2, 2, 12, 12]]
    left = boxes_to_masks(torch.tensor([[2, 2, 7, 12]]))
    merged = merge(
        view(box, [0.8], [0], masks=left), view(box, [0.3], [0]), view(box, [0.4], [0])
    )
    # The right half has 0.7 of 1.5, less than half of the score.
    assert torch.equal(merged.pred_instances.masks, left)
    merged = merge(
        view(box, [0.6], [0], masks=left), view(box, [0.3], [0]), view(box, [0.4], [0])
    )
    whole = boxes_to_masks(torch.tensor(box))
    assert torch.equal(merged.pred_instances.masks, whole)


def test_labels_and_distant_boxes_stay_apart():
    near, far = [2, 2, 12, 12], [18, 5, 28, 15]
    merged = merge(
        view([near, far], [0.9, 0.8], [0, 0]),
        view([near], [0.7], [1]),
        view([], [], []),
    )
    found = merged.pred_instances
    assert found.labels.tolist() == [0, 0, 1]
    expected = boxes_to_masks(torch.tensor([near, far, near]))
    assert torch.equal(found.masks, expected)


def test_the_best_are_kept():
    merged = merge(
        view([[2, 2, 12, 12]], [0.2], [0]),
        view([[18, 5, 28, 15]], [0.8], [0]),
        max_per_img=1,
    )
    torch.testing.assert_close(merged.pred_instances.scores, torch.tensor([0.8]))


def test_nothing_found():
    merged = merge(view([], [], []), view([], [], [], flip='horizontal'))
    assert len(merged.pred_instances) == 0 and merged.pred_instances.masks.shape[
        1:
    ] == (H, W)
