# Mask R-CNN with DGT-S on COCO, 1x. The paper's table 4(a): 48.4 box AP, 43.5 mask AP.
_base_ = 'mask_rcnn_dgt_t_1x_coco.py'
model = dict(
    backbone=dict(arch='small'),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
