# PASCAL VOC 2012 with SBD's annotations for more of its pictures ("train_aug"), as
# mmsegmentation lays it out.
_base_ = 'ade20k.py'
data_root = 'data/VOCdevkit/VOC2012'
images = dict(type='PascalVOCDataset', data_root=data_root)
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[
            dict(
                **images,
                data_prefix=dict(img_path='JPEGImages', seg_map_path=folder),
                ann_file=f'ImageSets/Segmentation/{split}.txt',
                pipeline=_base_.train_pipeline,
            )
            for folder, split in (
                ('SegmentationClass', 'train'),
                ('SegmentationClassAug', 'aug'),
            )
        ],
    )
)
val_dataloader = dict(
    dataset=dict(
        **images,
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
        ann_file='ImageSets/Segmentation/val.txt',
    )
)
test_dataloader = val_dataloader
