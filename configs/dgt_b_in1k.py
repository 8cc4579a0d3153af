# DGT-B on ImageNet-1k. The paper's table 2: 85.0 % top-1.
_base_ = 'dgt_t_in1k.py'
model = dict(
    backbone=dict(arch='base', drop_path_rate=0.5), head=dict(in_channels=1024)
)
