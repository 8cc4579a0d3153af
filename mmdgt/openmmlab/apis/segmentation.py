"""Segmentation of large pictures without the scores of all classes at full size."""

import torch
from mmengine.dataset import pseudo_collate
from mmseg.models import EncoderDecoder
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.structures import SegDataSample

CLASSES = 8  # at least as many have their scores at full size at a time


def scores_classes_apart(model: EncoderDecoder) -> bool:
    """Whether a segmentor sees the whole picture and only resizes its head's scores."""
    head = type(model.decode_head)
    own = BaseDecodeHead
    return (
        issubclass(head, own)  # a cascade has a list of heads
        and (head.predict, head.predict_by_feat) == (own.predict, own.predict_by_feat)
        and model.test_cfg.get('mode', 'whole') == 'whole'
        # A single score, as two classes may have, is held against a threshold.
        and model.out_channels > 1
    )


@torch.no_grad()
def segment(model: EncoderDecoder, item: dict) -> SegDataSample:
    """Segment a picture as ``model.test_step`` does, a few classes at a time.

    All 150 classes of ADE20K take 1.2 GB for a million pixels: scores are resized to
    the input and once more to the picture.

    Args:
        model (EncoderDecoder): One that :func:`scores_classes_apart`.
        item (dict): Of the test pipeline, ``inputs`` (3, H, W) and ``data_samples``.

    Returns:
        SegDataSample: Its ``pred_sem_seg`` is that of ``test_step``; it has no scores.
    """
    batch = model.data_preprocessor(pseudo_collate([item]))
    (sample,) = batch['data_samples']
    head = model.decode_head
    scores = head(model.extract_feat(batch['inputs']))
    highest, labels = scores.new_tensor(-torch.inf), scores.new_tensor(0).long()
    first = 0
    for part in scores.tensor_split(max(scores.shape[1] // CLASSES, 1), dim=1):
        resized = head.predict_by_feat(part, [sample.metainfo])
        model.postprocess_result(resized, [sample])
        score, label = sample.seg_logits.data.max(dim=0, keepdim=True)
        # The lowest class wins a tie.
        labels = torch.where(score > highest, label + first, labels)
        highest = torch.maximum(score, highest)
        first += part.shape[1]
    sample.pred_sem_seg.data = labels
    del sample.seg_logits
    return sample
