# DGT-T learns the features of a timm model on a folder of pictures, no labels needed:
#   python tools/train.py configs/distillation/dgt_t.py --cfg-options data_root=PICTURES
# model.teacher takes any backbone with four maps at strides 4 to 32. On ImageNet's
# scale a run wants the schedule of dgt_t_in1k.py; this one is for some ten thousand
# pictures.
_base_ = ['../_base_/runtime.py']
default_scope = 'mmpretrain'
data_root = 'data/pictures'
iterations = 20000
model = dict(
    type='FeatureDistiller',
    data_preprocessor=dict(
        type='ClsDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),
    # K as for a classifier: pictures of 224 pixels. Set the K of the task there.
    backbone=dict(type='DGT', arch='tiny', num_keys=98, drop_path_rate=0.1),
    teacher=dict(
        type='TIMMBackbone',
        model_name='convnext_tiny',
        features_only=True,
        pretrained=True,
        out_indices=(0, 1, 2, 3),
    ),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='RandomResizedCrop', scale=224, backend='pillow', interpolation='bicubic'
    ),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=64,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='CustomDataset',
        data_root=data_root,
        with_label=False,
        pipeline=train_pipeline,
    ),
)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(
        type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=500, end=iterations
    ),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations)
val_cfg = None  # nothing to evaluate
auto_scale_lr = dict(enable=False, base_batch_size=64)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='AtomicCheckpointHook', by_epoch=False, interval=2000, minutes=20
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
log_processor = dict(by_epoch=False)
