# What the features of demo_student.py are worth to UperNet, for
# tools/train_variants.py: the small DGT from random weights and from there.
_base_ = '../upernet_dgt_t_demo.py'
comparison = dict(
    heading='A start from distilled features',
    metric='mIoU',
    title='mIoU (%)',
    size=(128, 128),  # of the FLOPs: height, width
)
student_checkpoint = 'work_dirs/demo_student/iter_600.pth'
variants = dict(
    random=dict(title='random weights'),
    distilled=dict(
        title='distilled',
        settings=dict(
            model=dict(backbone=dict(init_cfg=dict(checkpoint=student_checkpoint)))
        ),
    ),
)
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            dims=(32, 64, 128, 256),
            depths=(1, 2, 6, 2),
            num_heads=(2, 4, 8, 16),
            stem_dims=16,
        ),
        num_groups=16,
        num_keys=32,
    )
)
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = val_dataloader = test_dataloader = loader
iterations = 200
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(
        type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=20, end=iterations
    ),
]
train_cfg = dict(max_iters=iterations, val_interval=iterations)
default_hooks = dict(checkpoint=None)
