# Mask R-CNN with DGT-T on COCO, 1x. The paper's table 4(a): 47.7 box AP, 43.0 mask AP.
_base_ = [
    '_base_/models/mask_rcnn_dgt.py',
    '_base_/datasets/coco.py',
    '_base_/schedules/detection_1x.py',
    '_base_/runtime.py',
]
custom_imports = dict(imports=['mmdgt', 'mmdgt.openmmlab.detection'])
custom_hooks = [*_base_.custom_hooks, dict(type='NumClassCheckHook')]
