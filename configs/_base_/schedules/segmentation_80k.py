# 80k iterations of 32 images, the recipe of PVT and Twins for Semantic FPN: AdamW with
# little decay, no warm-up.
# lr is for 32 images an iteration, 8 GPUs with 4 each.
_base_ = 'segmentation_160k.py'
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=1e-4))
param_scheduler = [
    dict(type='PolyLR', eta_min=0.0, power=0.9, by_epoch=False, begin=0, end=80000)
]
train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
auto_scale_lr = dict(base_batch_size=32)
