# Mask R-CNN with DGT-B on COCO, 1x. The paper's table 4(a): 49.1 box AP, 44.1 mask AP.
_base_ = 'mask_rcnn_dgt_t_1x_coco.py'
model = dict(
    backbone=dict(arch='base', drop_path_rate=0.3),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
