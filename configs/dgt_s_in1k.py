# DGT-S on ImageNet-1k. The paper's table 2: 84.6 % top-1.
_base_ = 'dgt_t_in1k.py'
model = dict(
    backbone=dict(arch='small', drop_path_rate=0.3), head=dict(in_channels=768)
)
