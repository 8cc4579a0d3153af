# Backbones in UperNet under one recipe, for tools/train_variants.py: small pictures and
# narrow heads, from random weights. A config of your own names classes and data;
# camvid.py is one.
_base_ = ['../upernet_dgt_t_ade20k.py', 'backbones.py']
scale, crop_size = (160, 120), (96, 96)  # width and height at most; of a crop
iterations = 2000
comparison = dict(
    heading='Backbones in UperNet',
    metric='mIoU',
    title='mIoU (%)',
    size=scale[::-1],  # of the FLOPs: height, width
)
# Share: of the iterations of a run that a trial takes.
learning_rates = dict(tried=(3e-4, 1e-3), share=0.25)
model = dict(
    data_preprocessor=dict(size=crop_size),
    # Of 576 tokens in stage 1; the paper's K of 98 is of 3136.
    backbone=dict(num_keys=32, drop_path_rate=0.0),
    decode_head=dict(channels=64),
    auxiliary_head=dict(channels=64),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='CheckLabelMap'),
    dict(type='RandomResize', scale=scale, ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations'),  # after Resize: at the size of the picture
    dict(type='CheckLabelMap'),
    dict(type='PackSegInputs'),
]
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=4, **loader, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(**loader, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(custom_keys=dict(relative_position_bias=dict(decay_mult=0.0))),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=10),
    dict(
        type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=10, end=iterations
    ),
]
train_cfg = dict(max_iters=iterations, val_interval=iterations)
auto_scale_lr = dict(base_batch_size=4)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=iterations, minutes=None, save_optimizer=False),
)
