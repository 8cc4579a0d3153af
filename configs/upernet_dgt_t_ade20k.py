# UperNet with DGT-T on ADE20K. The paper's table 3: 50.2 mIoU, multi-scale 50.8.
_base_ = [
    '_base_/models/upernet_dgt.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/segmentation_160k.py',
    '_base_/runtime.py',
]
