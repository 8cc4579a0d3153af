# UperNet with DGT-S on ADE20K. The paper's table 3: 50.8 mIoU, multi-scale 51.6.
_base_ = 'upernet_dgt_t_ade20k.py'
model = dict(
    backbone=dict(arch='small'),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
