# Mask2Former with DGT-T on ADE20K, semantic segmentation.
_base_ = [
    '_base_/models/mask2former_semantic_dgt.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/mask2former_160k.py',
    '_base_/runtime.py',
]
custom_imports = dict(imports=['mmdgt', 'mmdet.models'])
# The shorter side from half to twice of 512 pixels.
train_pipeline = _base_.train_pipeline
train_pipeline[3] = dict(
    type='RandomChoiceResize',
    scales=[int(51.2 * i) for i in range(5, 21)],
    resize_type='ResizeShortestEdge',
    max_size=2048,
)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
