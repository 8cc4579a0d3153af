# What the features of demo_student.py are worth to UperNet, for
# tools/train_variants.py: the small DGT from random weights and from there.
_base_ = '../comparisons/upernet_demo.py'
comparison = dict(heading='A start from distilled features')
student_checkpoint = 'work_dirs/demo_student/iter_600.pth'
variants = dict(
    random=dict(title='random weights'),
    distilled=dict(
        title='distilled',
        settings=dict(
            model=dict(backbone=dict(init_cfg=dict(checkpoint=student_checkpoint)))
        ),
    ),
)
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            dims=(32, 64, 128, 256),
            depths=(1, 2, 6, 2),
            num_heads=(2, 4, 8, 16),
            stem_dims=16,
        ),
        num_groups=16,
        num_keys=32,
    )
)
