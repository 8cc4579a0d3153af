# Mask2Former with DGT-T on COCO, instance segmentation.
_base_ = [
    '_base_/models/mask2former_instance_dgt.py',
    '_base_/datasets/coco_large_scale_jitter.py',
    '_base_/schedules/mask2former_50e.py',
    '_base_/runtime.py',
]
custom_imports = dict(imports=['mmdgt', 'mmdgt.openmmlab.detection'])
custom_hooks = [*_base_.custom_hooks, dict(type='NumClassCheckHook')]
