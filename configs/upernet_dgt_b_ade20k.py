# UperNet with DGT-B on ADE20K. The paper's table 3: 51.2 mIoU, multi-scale 51.8.
_base_ = 'upernet_dgt_t_ade20k.py'
model = dict(
    backbone=dict(arch='base'),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
