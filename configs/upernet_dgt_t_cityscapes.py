# UperNet with DGT-T on Cityscapes.
_base_ = [
    '_base_/models/upernet_dgt.py',
    '_base_/datasets/cityscapes.py',
    '_base_/schedules/segmentation_160k.py',
    '_base_/runtime.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
)
