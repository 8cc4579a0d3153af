# The ablations of the paper's table 4 in miniature, for tools/train_variants.py: DGT-T
# at half its width and with 6 of 17 blocks in stage 3, on demo pictures of 128 pixels.
# The paper's 224 pixels make 3136 tokens in stage 1, these make 1024. What counts
# tokens shrinks alike: G from 48 to 16, K from 98 to 32, Swin's windows from 7x7 to
# 4x4, CSWin's stripes from (1, 2, 7) to (1, 1, 4). CMT's strides shrink by themselves.
_base_ = 'dgt_t_demo.py'
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
    ),
    head=dict(in_channels=256),
)
comparison = dict(
    heading='Ablations in miniature',
    metric='accuracy/top1',
    title='top-1 (%)',
    size=(128, 128),  # of the FLOPs: height, width
)
# What the paper varied, to be counted beside.
reference = dict(title='DGT-T', config='dgt_t_in1k.py', size=(224, 224))
# By name: the title; what differs from the above; the same in the backbone of the
# reference; the paper's top-1 there.
variants = dict(
    default=dict(title='G = 16, K = 32 (paper: 48, 98)', published=83.8),
    half_groups=dict(
        title='G = 8, K = 32 (24, 98)',
        settings=dict(model=dict(backbone=dict(num_groups=8))),
        reference=dict(num_groups=24),
        published=83.6,
    ),
    half_keys=dict(
        title='G = 16, K = 16 (48, 49)',
        settings=dict(model=dict(backbone=dict(num_keys=16))),
        reference=dict(num_keys=49),
        published=83.7,
    ),
    mirrored=dict(
        title='eq. 4 mirrored',
        settings={'custom_hooks.0.mirrored': True},  # CentroidHook
    ),
    shifted_window=dict(
        title='windows of Swin',
        settings=dict(
            model=dict(
                backbone=dict(token_mixer=dict(type='shifted_window', window_size=4))
            )
        ),
        reference=dict(token_mixer='shifted_window'),
        published=82.8,
    ),
    cross_window=dict(
        title='stripes of CSWin',
        settings=dict(
            model=dict(
                backbone=dict(
                    token_mixer=dict(type='cross_window', stripe_widths=(1, 1, 4))
                )
            )
        ),
        reference=dict(token_mixer='cross_window'),
        published=83.0,
    ),
    reduction=dict(
        title='reduction of CMT',
        settings=dict(model=dict(backbone=dict(token_mixer='reduction'))),
        reference=dict(token_mixer='reduction'),
        published=83.4,
    ),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=128, crop_ratio_range=(0.5, 1.0)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=128),
    dict(type='PackInputs'),
]
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(**loader, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(**loader, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

iterations = 200
optim_wrapper = dict(
    optimizer=dict(lr=5e-4),
    paramwise_cfg=dict(custom_keys=dict(relative_position_bias=dict(decay_mult=0.0))),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=0, end=iterations
    ),
]
train_cfg = dict(
    _delete_=True, by_epoch=False, max_iters=iterations, val_interval=iterations
)
default_hooks = dict(logger=dict(log_metric_by_epoch=False), checkpoint=None)
log_processor = dict(by_epoch=False)
