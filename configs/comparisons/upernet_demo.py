# The demo's UperNet in 200 iterations, for tools/train_variants.py.
_base_ = '../upernet_dgt_t_demo.py'
comparison = dict(
    metric='mIoU',
    title='mIoU (%)',
    size=(128, 128),  # of the FLOPs: height, width
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
