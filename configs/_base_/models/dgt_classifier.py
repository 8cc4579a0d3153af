# DGT-T with the paper's head of two linear layers.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='DGT',
        arch='tiny',
        num_keys=98,
        out_indices=(3,),
        out_norm=False,
        drop_path_rate=0.2,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='StackedLinearClsHead',
        num_classes=1000,
        in_channels=512,
        mid_channels=[1280],
        act_cfg=dict(type='GELU'),
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        cal_acc=False,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
    ),
    train_cfg=dict(
        augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]
    ),
)
