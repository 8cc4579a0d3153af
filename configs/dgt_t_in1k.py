# DGT-T on ImageNet-1k. The paper's table 2: 83.8 % top-1.
_base_ = [
    '_base_/models/dgt_classifier.py',
    '_base_/datasets/imagenet.py',
    '_base_/schedules/classification_300e.py',
    '_base_/runtime.py',
]
