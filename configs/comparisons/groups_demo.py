# What becomes of the groups in training (docs/groups.md): the demo's UperNet with both
# forms of equation 4, empty groups left alone or not.
_base_ = 'upernet_demo.py'
comparison = dict(
    heading='Live groups in training',
    logged=('live_groups', 'largest_group'),  # of the last line of the training log
)
# By name: the title, and what differs in CentroidHook.
variants = dict(
    printed_keep=dict(
        title='eq. 4 as printed, empty groups keep their centroids',
        settings={'custom_hooks.0.reseed': False},
    ),
    printed_split=dict(title='eq. 4 as printed, empty groups split the largest'),
    mirrored_keep=dict(
        title='eq. 4 mirrored, empty groups keep their centroids',
        settings={'custom_hooks.0.mirrored': True, 'custom_hooks.0.reseed': False},
    ),
    mirrored_split=dict(
        title='eq. 4 mirrored, empty groups split the largest',
        settings={'custom_hooks.0.mirrored': True},
    ),
)
