# Mask R-CNN with DGT-T on COCO, 3x at several scales.
_base_ = [
    '_base_/models/mask_rcnn_dgt.py',
    '_base_/datasets/coco_multi_scale.py',
    '_base_/schedules/detection_3x.py',
    '_base_/runtime.py',
]
custom_imports = dict(imports=['mmdgt', 'mmdgt.openmmlab.detection'])
custom_hooks = [*_base_.custom_hooks, dict(type='NumClassCheckHook')]
