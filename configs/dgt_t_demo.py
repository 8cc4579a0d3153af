# DGT-T on the shapes of the generated scenes of tools/make_demo_data.py, small enough
# for two CPU cores: pictures of 64 pixels, a short schedule, little augmentation.
_base_ = 'dgt_t_in1k.py'
data_root = 'data/demo/imagenet'
classes = ('cross', 'disk', 'ring', 'square', 'star', 'triangle')
data_preprocessor = dict(num_classes=len(classes))
model = dict(
    backbone=dict(drop_path_rate=0.0),
    head=dict(num_classes=len(classes)),
    train_cfg=None,  # no mixing of pictures
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=64, crop_ratio_range=(0.5, 1.0)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=64),
    dict(type='PackInputs'),
]
dataset = dict(data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(
    batch_size=16, num_workers=1, dataset=dict(**dataset, pipeline=train_pipeline)
)
val_dataloader = dict(
    batch_size=16, num_workers=1, dataset=dict(**dataset, pipeline=test_pipeline)
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

epochs = 2
optim_wrapper = dict(optimizer=dict(lr=2e-4), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        by_epoch=True,
        begin=0,
        end=epochs,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=epochs, val_interval=epochs)
auto_scale_lr = dict(base_batch_size=16)
randomness = dict(seed=0)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(max_keep_ckpts=1))
