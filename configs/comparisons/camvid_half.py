# camvid.py with every backbone half as wide, for a machine with little time.
_base_ = 'camvid.py'
comparison = dict(heading='Backbones of half the width on CamVid')
iterations = 200
learning_rates = dict(share=0.25)
variants = dict(
    dgt_t=dict(
        settings=dict(
            model=dict(
                backbone=dict(
                    arch=dict(
                        _delete_=True,
                        dims=(32, 64, 128, 256),
                        depths=(1, 2, 17, 2),
                        num_heads=(2, 4, 8, 16),
                        stem_dims=16,
                    )
                )
            )
        )
    ),
    swin_t=dict(
        settings=dict(
            model=dict(
                backbone=dict(
                    arch=dict(
                        _delete_=True,
                        embed_dims=48,
                        depths=[2, 2, 6, 2],
                        num_heads=[2, 4, 8, 16],
                    )
                )
            )
        )
    ),
    convnext_t=dict(
        settings=dict(
            model=dict(
                backbone=dict(
                    arch=dict(
                        _delete_=True,
                        depths=[3, 3, 9, 3],
                        channels=[48, 96, 192, 384],
                    )
                )
            )
        )
    ),
    resnet50=dict(
        settings=dict(model=dict(backbone=dict(stem_channels=32, base_channels=32)))
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(
        type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=20, end=iterations
    ),
]
train_cfg = dict(max_iters=iterations, val_interval=iterations)
default_hooks = dict(checkpoint=dict(interval=iterations))
