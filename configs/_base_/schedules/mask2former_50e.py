# Mask2Former's recipe for COCO: 50 epochs of 16 images in iterations, no warm-up.
_base_ = ['detection_1x.py', 'mask2former_optimizer.py']
iterations = 368750
optim_wrapper = _base_.mask2former_optimizer
param_scheduler = [
    dict(
        type='MultiStepLR',
        by_epoch=False,
        begin=0,
        end=iterations,
        milestones=[327778, 355092],
        gamma=0.1,
    )
]
train_cfg = dict(
    _delete_=True,
    type='IterBasedTrainLoop',
    max_iters=iterations,
    val_interval=iterations // 10,
)
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=iterations // 10),
)
log_processor = dict(by_epoch=False)
