# A teacher for demo_student.py: timm's ResNet-18 in UperNet, from the labelled scenes
# of tools/make_demo_data.py. Its maps have the channels of DGT-T's.
_base_ = '../upernet_dgt_t_demo.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.TIMMBackbone',
        model_name='resnet18',
        features_only=True,
        out_indices=(1, 2, 3, 4),
    )
)
