# A small DGT learns the features of demo_teacher.py from the pictures of the scenes,
# which it sees without labels.
_base_ = 'dgt_t.py'
data_root = 'data/demo/ade20k/images/training'
teacher_checkpoint = 'work_dirs/demo_teacher/iter_650.pth'
arch = dict(
    _delete_=True,
    dims=(32, 64, 128, 256),
    depths=(1, 2, 6, 2),
    num_heads=(2, 4, 8, 16),
    stem_dims=16,
)
model = dict(
    backbone=dict(arch=arch, num_groups=16, num_keys=32, drop_path_rate=0.0),
    teacher=dict(
        model_name='resnet18',
        pretrained=False,
        out_indices=(1, 2, 3, 4),
        init_cfg=dict(
            type='Pretrained', checkpoint=teacher_checkpoint, prefix='backbone.'
        ),
    ),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=96, crop_ratio_range=(0.5, 1.0)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(data_root=data_root, pipeline=train_pipeline),
)
iterations = 600
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=50, end=iterations
    ),
]
train_cfg = dict(max_iters=iterations)
auto_scale_lr = dict(base_batch_size=8)
randomness = dict(seed=0)
default_hooks = dict(checkpoint=dict(interval=iterations, max_keep_ckpts=1))
