# What every configuration shares, whichever framework runs it.
custom_imports = dict(imports=['mmdgt'], allow_failed_imports=False)
custom_hooks = [
    # Eqs. 3 and 4 with tau = 0.1 * lr. Without reseed many groups lose all queries.
    dict(type='CentroidHook', reseed=True),
    dict(type='PlainCheckpointHook'),
    dict(type='LabelCheckHook'),
    dict(type='LossCheckHook'),
]
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
vis_backends = [dict(type='LocalVisBackend')]
log_level = 'INFO'
load_from = None
resume = False
