# Mask2Former's recipe for ADE20K: 160k iterations of 16 images, no warm-up.
_base_ = ['segmentation_160k.py', 'mask2former_optimizer.py']
optim_wrapper = _base_.mask2former_optimizer
param_scheduler = [
    dict(type='PolyLR', eta_min=0.0, power=0.9, by_epoch=False, begin=0, end=160000)
]
