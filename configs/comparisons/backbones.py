# The backbones that segmentation.py and classification.py compare; DGT-T is theirs.
# By name: the title, and what differs from the other settings. in_channels of the heads
# follow from the backbone: any of mmseg, mmpretrain and mmdet, or of timm as
# mmpretrain.TIMMBackbone, with four maps at strides 4 to 32.
peer = dict(_delete_=True, out_indices=(0, 1, 2, 3))
variants = dict(
    dgt_t=dict(title='DGT-T'),
    swin_t=dict(
        title='Swin-T',
        settings=dict(
            model=dict(
                backbone=dict(
                    type='mmpretrain.SwinTransformer',
                    arch='tiny',
                    drop_path_rate=0.0,
                    pad_small_map=True,
                    **peer,
                )
            )
        ),
    ),
    convnext_t=dict(
        title='ConvNeXt-T',
        settings=dict(
            model=dict(
                backbone=dict(
                    type='mmpretrain.ConvNeXt',
                    arch='tiny',
                    drop_path_rate=0.0,
                    gap_before_final_norm=False,
                    **peer,
                )
            )
        ),
    ),
    resnet50=dict(
        title='ResNet-50',
        settings=dict(
            model=dict(backbone=dict(type='mmpretrain.ResNet', depth=50, **peer))
        ),
    ),
)
