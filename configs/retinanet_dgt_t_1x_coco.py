# RetinaNet with DGT-T on COCO, 1x.
_base_ = [
    '_base_/models/retinanet_dgt.py',
    '_base_/datasets/coco_boxes.py',
    '_base_/schedules/detection_1x.py',
    '_base_/runtime.py',
]
custom_hooks = [*_base_.custom_hooks, dict(type='NumClassCheckHook')]
tta_model = dict(type='DetTTAModel')  # boxes alone
