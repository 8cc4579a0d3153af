# Backbones as classifiers under one recipe, for tools/train_variants.py: small
# pictures, from random weights. A config of your own names data_root,
# with train/CLASS and val/CLASS in it, and the classes.
_base_ = ['../dgt_t_in1k.py', 'backbones.py']
scale = 96
iterations = 2000
comparison = dict(
    heading='Backbones as classifiers',
    metric='accuracy/top1',
    title='top-1 (%)',
    size=(scale, scale),  # of the FLOPs: height, width
)
# Share: of the iterations of a run that a trial takes.
learning_rates = dict(tried=(3e-4, 1e-3), share=0.25)
model = dict(
    # Of 576 tokens in stage 1; the paper's K of 98 is of 3136.
    backbone=dict(num_keys=32, drop_path_rate=0.0),
    train_cfg=None,  # no mixing of pictures
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=scale, crop_ratio_range=(0.25, 1.0)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=scale, edge='short'),
    dict(type='CenterCrop', crop_size=scale),
    dict(type='PackInputs'),
]
loader = dict(batch_size=16, num_workers=0, persistent_workers=False)
train_dataloader = dict(**loader, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(**loader, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
optim_wrapper = dict(
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(custom_keys=dict(relative_position_bias=dict(decay_mult=0.0))),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=10),
    dict(
        type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=10, end=iterations
    ),
]
train_cfg = dict(
    _delete_=True, by_epoch=False, max_iters=iterations, val_interval=iterations
)
auto_scale_lr = dict(base_batch_size=16)
default_hooks = dict(logger=dict(log_metric_by_epoch=False), checkpoint=None)
log_processor = dict(by_epoch=False)
