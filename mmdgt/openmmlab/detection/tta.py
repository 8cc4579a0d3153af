"""Test-time augmentation of instance segmentation, which mmdetection leaves open."""

import torch
from mmcv.ops import batched_nms
from mmdet.models import DetTTAModel
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmengine.structures import InstanceData
from torch import Tensor


@MODELS.register_module()
class InstanceTTAModel(DetTTAModel):
    """Merges the boxes and masks that a detector finds in several views of an image.

    Non-maximum suppression over the boxes of all views tells which to keep. The mask
    of a kept box is where the views agree: of the boxes it overlaps, with its own
    label, those whose masks cover a pixel hold at least half of the score.

    Args:
        tta_cfg (dict): ``nms``, as for ``mmcv.ops.batched_nms``, and
            ``max_per_img``, the most boxes to keep.
    """

    def merge_preds(
        self, data_samples_list: list[tuple[DetDataSample, ...]]
    ) -> list[DetDataSample]:
        """Merge the views of every image."""
        return [self._merge_views(views) for views in data_samples_list]

    def _merge_views(self, views: tuple[DetDataSample, ...]) -> DetDataSample:
        found = [view.pred_instances for view in views]
        boxes, scores = self.merge_aug_bboxes(
            [instances.bboxes for instances in found],
            [instances.scores for instances in found],
            [view.metainfo for view in views],
        )
        labels = torch.cat([instances.labels for instances in found])
        masks = torch.cat([_upright_masks(view) for view in views])
        if not len(boxes):
            return views[0]
        nms = self.tta_cfg['nms']
        _, keep = batched_nms(boxes, scores, labels, nms)
        keep = keep[: self.tta_cfg['max_per_img']]
        agree = bbox_overlaps(boxes[keep], boxes) >= nms['iou_threshold']
        agree &= labels[keep, None] == labels
        merged = [_vote(masks[voters], scores[voters]) for voters in agree]
        result = views[0].new()
        result.pred_instances = InstanceData(
            bboxes=boxes[keep],
            scores=scores[keep],
            labels=labels[keep],
            masks=torch.stack(merged),
        )
        return result


def _upright_masks(view: DetDataSample) -> Tensor:
    """The masks (N, H, W) of a view, turned back if it was flipped."""
    masks = view.pred_instances.masks
    if not view.flip:
        return masks
    dims = {'horizontal': [2], 'vertical': [1], 'diagonal': [1, 2]}
    return masks.flip(dims[view.flip_direction])


def _vote(masks: Tensor, scores: Tensor) -> Tensor:
    """(N, H, W) bool and (N,) -> (H, W), where at least half of the score agrees."""
    share = torch.einsum('n,nhw->hw', scores / scores.sum(), masks.to(scores.dtype))
    return share >= 0.5
