# Semantic FPN with DGT-T on ADE20K.
_base_ = [
    '_base_/models/fpn_dgt.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/segmentation_80k.py',
    '_base_/runtime.py',
]
train_dataloader = dict(batch_size=4)
