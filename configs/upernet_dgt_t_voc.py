# UperNet with DGT-T on PASCAL VOC 2012.
_base_ = [
    '_base_/models/upernet_dgt.py',
    '_base_/datasets/voc.py',
    '_base_/schedules/segmentation_40k.py',
    '_base_/runtime.py',
]
model = dict(decode_head=dict(num_classes=21), auxiliary_head=dict(num_classes=21))
