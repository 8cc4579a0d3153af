# Mask2Former for instance segmentation on DGT-T.
_base_ = ['mask_rcnn_dgt.py', 'mask2former_head.py']
num_classes = 80
head = _base_.mask2former.head
model = dict(
    _delete_=True,
    type='Mask2Former',
    data_preprocessor=dict(
        **_base_.model.data_preprocessor,
        batch_augments=[
            dict(type='BatchFixedSizePad', size=(1024, 1024), pad_mask=True)
        ],
    ),
    backbone=dict(_base_.model.backbone, drop_path_rate=0.3),
    panoptic_head=dict(
        head,
        num_things_classes=num_classes,
        num_stuff_classes=0,
        # The last class is "nothing here".
        loss_cls=dict(head.loss_cls, class_weight=[1.0] * num_classes + [0.1]),
    ),
    panoptic_fusion_head=dict(
        type='MaskFormerFusionHead',
        num_things_classes=num_classes,
        num_stuff_classes=0,
        loss_panoptic=None,
    ),
    train_cfg=_base_.mask2former.train_cfg,
    test_cfg=dict(
        panoptic_on=False,
        semantic_on=False,
        instance_on=True,
        max_per_image=100,
        iou_thr=0.8,
        filter_low_score=True,
    ),
)
