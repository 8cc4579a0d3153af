# Mask2Former for semantic segmentation on DGT-T.
_base_ = ['upernet_dgt.py', 'mask2former_head.py']
num_classes = 150
head = _base_.mask2former.head
model = dict(
    data_preprocessor=dict(test_cfg=dict(size_divisor=32)),
    decode_head=dict(
        head,
        _delete_=True,
        num_classes=num_classes,
        # The last class is "nothing here".
        loss_cls=dict(head.loss_cls, class_weight=[1.0] * num_classes + [0.1]),
        train_cfg=_base_.mask2former.train_cfg,
    ),
    auxiliary_head=None,
)
