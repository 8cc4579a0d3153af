"""Weights travel from the classifier to the dense tasks, whole or not at all."""

import pickle

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

from mmdgt.openmmlab import DGT

CONFIGS = REPOSITORY / 'configs'
DIMS = (8, 16, 16, 32)
ARCH = dict(dims=DIMS, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), stem_dims=8)
TINY = (
    'model.backbone.arch._delete_=True',
    *(
        f'model.backbone.arch.{key}={str(x).replace(" ", "")}'
        for key, x in ARCH.items()
    ),
    'train_dataloader.num_workers=0',
    'train_dataloader.batch_size=4',
    'val_dataloader.num_workers=0',
)
OUTPUT_NORMS = {f'norm{i}.{name}' for i in range(4) for name in ('weight', 'bias')}


@pytest.fixture(scope='module')
def classifier(demo_data, run_tool, tmp_path_factory):
    """The checkpoint of an epoch of the classification demo, and its backbone."""
    folder = tmp_path_factory.mktemp('classifier')
    run_tool(
        'train.py',
        CONFIGS / 'dgt_t_demo.py',
        '--work-dir',
        folder,
        '--cfg-options',
        f'data_root={demo_data}/imagenet',
        'model.head.in_channels=32',
        'train_dataloader.dataset.indices=8',
        'train_cfg.max_epochs=1',
        *TINY,
    )
    return folder / 'epoch_1.pth', backbone_of(folder / 'epoch_1.pth')


def backbone_of(file):
    state = torch.load(file, weights_only=True)['state_dict']
    parts = (key.split('.', 1) for key in state)
    return {key: state[f'backbone.{key}'] for top, key in parts if top == 'backbone'}


def uper_net(**backbone):
    cfg = Config.fromfile(CONFIGS / '_base_/models/upernet_dgt.py')
    cfg.model.decode_head.update(in_channels=DIMS, channels=16)
    cfg.model.auxiliary_head.update(in_channels=DIMS[2], channels=16)
    cfg.model.backbone.update(arch=ARCH, **backbone)
    init_default_scope('mmseg')
    return revert_sync_batchnorm(MODELS.build(cfg.model))


def mask_rcnn(init_cfg, **backbone):
    pytest.importorskip('mmdet.models')
    cfg = Config.fromstring(
        "_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'", '.py'
    )
    cfg.model.neck.in_channels = list(DIMS)
    cfg.model.backbone = dict(type='DGT', arch=ARCH, init_cfg=init_cfg, **backbone)
    init_default_scope('mmdet')
    return MODELS.build(cfg.model)


@pytest.mark.parametrize('build', [uper_net, mask_rcnn])
def test_a_classifier_becomes_a_backbone(classifier, build):
    file, weights = classifier
    # As the config has it, filled in; another K than in pre-training.
    line = dict(type='Pretrained', checkpoint=str(file), prefix='backbone.')
    model = build(init_cfg=line, num_keys=11)
    model.init_weights()
    ours = model.backbone.state_dict()
    assert ours.keys() - weights.keys() == OUTPUT_NORMS
    assert not weights.keys() - ours.keys()
    assert not [key for key in weights if not torch.equal(ours[key], weights[key])]
    for key in OUTPUT_NORMS:
        assert (ours[key] == (1 if key.endswith('weight') else 0)).all(), key
    # Another size than in pre-training.
    sizes = [tuple(x.shape[1:]) for x in model.backbone(torch.randn(1, 3, 64, 96))]
    assert sizes == [(c, 16 >> i, 24 >> i) for i, c in enumerate(DIMS)]


def test_the_heads_are_initialised_all_the_same(classifier):
    line = dict(type='Pretrained', checkpoint=str(classifier[0]), prefix='backbone.')
    model = uper_net(init_cfg=line)
    model.init_weights()
    # mmsegmentation draws the classifying layer with a standard deviation of 0.01.
    assert model.decode_head.conv_seg.weight.std().item() == pytest.approx(
        0.01, rel=0.1
    )
    assert not model.decode_head.conv_seg.bias.any()


def test_without_a_checkpoint_the_weights_are_random():
    weights = []
    for _ in range(2):
        model = uper_net()
        model.init_weights()
        weights.append(model.backbone.stages[3].blocks[0].attention.qkv.weight)
        assert weights[-1].std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(*weights)


def test_train_from_the_command_line(classifier, demo_data, run_tool, tmp_path):
    """With a learning rate of 0, what was loaded is what is saved."""
    file, weights = classifier
    log = run_tool(
        'train.py',
        CONFIGS / 'upernet_dgt_t_demo.py',
        '--work-dir',
        tmp_path,
        '--cfg-options',
        f'model.backbone.init_cfg.checkpoint={file}',
        f'data_root={demo_data}/ade20k',
        f'model.decode_head.in_channels={str(DIMS).replace(" ", "")}',
        f'model.auxiliary_head.in_channels={DIMS[2]}',
        'optim_wrapper.optimizer.lr=0',
        'train_cfg.max_iters=1',
        *TINY,
    )
    said = f'DGT: loaded {len(weights)} tensors of {file}; not in it and left as'
    assert said in log.stdout + log.stderr
    trained = backbone_of(tmp_path / 'iter_1.pth')
    # Centroids and statistics move without a learning rate.
    learned = dict(DGT(ARCH).named_parameters()).keys() & weights.keys()
    assert not [key for key in learned if not torch.equal(trained[key], weights[key])]


def load(file, prefix=None, arch=ARCH, **backbone):
    """The backbone after init_weights, and its weights before."""
    init_cfg = dict(type='Pretrained', checkpoint=str(file), prefix=prefix)
    model = DGT(arch, init_cfg=init_cfg, **backbone)
    model.init_weights()
    return model


def save(file, change=lambda state: state):
    state = DGT(ARCH).state_dict()
    torch.save(change(state), file)
    return state


@pytest.mark.parametrize('wrapper', ['state_dict', 'model', None])
@pytest.mark.parametrize('prefix', ['backbone.', 'backbone', None])
def test_wrappers_and_prefixes(tmp_path, wrapper, prefix):
    def wrap(state):
        start = 'backbone.' if prefix else ''
        state = {start + key: value for key, value in state.items()}
        return {wrapper: state, 'epoch': 3} if wrapper else state

    state = save(tmp_path / 'w.pth', wrap)
    ours = load(tmp_path / 'w.pth', prefix).state_dict()
    assert ours.keys() == state.keys()
    assert not [key for key in state if not torch.equal(ours[key], state[key])]


def test_outputs_and_stages_that_this_backbone_does_not_have(tmp_path):
    state = save(tmp_path / 'w.pth')
    ours = load(tmp_path / 'w.pth', out_indices=(0, 1)).state_dict()
    more = ('norm2.', 'norm3.', 'stages.2.', 'stages.3.')
    assert ours.keys() == {key for key in state if not key.startswith(more)}
    assert not [key for key in ours if not torch.equal(ours[key], state[key])]


@pytest.mark.parametrize(
    ('stored', 'prefix', 'message'),
    [
        ('backbone.', 'foo.', "'foo.'; they start with 'backbone.'. .*to 'backbone.'"),
        ('module.backbone.', 'backbone.', "with 'module.'. .*to 'module.backbone.'"),
        ('backbone.', None, "to 'backbone.'"),
        ('', 'backbone.', "'norm0.', .*'stem.'. .*to ''"),
    ],
)
def test_wrong_prefix(tmp_path, stored, prefix, message):
    save(tmp_path / 'w.pth', lambda state: {stored + k: x for k, x in state.items()})
    with pytest.raises(ValueError, match=f'none of the .* keys of .*w.pth .*{message}'):
        load(tmp_path / 'w.pth', prefix)


def test_weights_of_something_else(tmp_path):
    torch.save({'conv1.weight': torch.ones(1)}, tmp_path / 'w.pth')
    with pytest.raises(ValueError, match=r"'conv1\.'\. None fits a DGT"):
        load(tmp_path / 'w.pth')


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (
            dict(arch=dict(ARCH, stem_dims=4)),
            r'stem.0.weight \(8, 3, 3, 3\) there, \(4, 3, 3, 3\) here.*its arch',
        ),
        (
            dict(arch=dict(ARCH, depths=(1, 1, 3, 1))),
            r'missing: 32 \(stages.2.blocks.2',
        ),
        (
            dict(arch=dict(ARCH, depths=(1, 1, 1, 1))),
            r'unexpected: 32 \(stages.2.bl',
        ),
        (dict(arch=dict(ARCH, post_norm=True)), r'missing: 5 \(.*logit_scale'),
        (
            dict(num_groups=24),
            r'missing: none; unexpected: none; of another shape: 4 \(stages.0.blocks.0'
            r'.attention.centroids \(1, 48, 8\) there, \(1, 24, 8\) here.*num_groups',
        ),
        (dict(in_channels=4), r'\(8, 4, 3, 3\) here\).*in_channels'),
    ],
)
def test_weights_of_another_backbone(tmp_path, settings, message):
    save(tmp_path / 'w.pth')
    with pytest.raises(ValueError, match=f'w.pth holds .* another.*{message}'):
        load(tmp_path / 'w.pth', **settings)


@pytest.mark.parametrize(
    'lost',
    ['stages.3.', 'stem.0.weight', 'norm0.bias', 'stages.0.blocks.0.attention.c'],
)
def test_incomplete_weights(tmp_path, lost):
    def cut(state):
        return {key: x for key, x in state.items() if not key.startswith(lost)}

    save(tmp_path / 'w.pth', cut)
    with pytest.raises(ValueError, match=rf'missing: \d+ \({lost}'):
        load(tmp_path / 'w.pth')


def test_an_error_leaves_the_backbone_as_it_was(tmp_path):
    save(tmp_path / 'w.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth'))
    model = DGT(ARCH, num_groups=24, init_cfg=init_cfg)
    before = model.stem[0].weight.clone()
    with pytest.raises(ValueError, match='num_groups'):
        model.init_weights()
    assert torch.equal(model.stem[0].weight, before)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (dict(state_dict=np.random.RandomState()), 'more than plain data: .*numpy'),
        (torch.ones(2), 'expected tensors by their names, .* got Tensor'),
        ({'meta': {}, 'epoch': 3}, r"'state_dict' or 'model', got 2 \(meta, epoch\)"),
        ({'state_dict': {}}, r'got 1 \(state_dict\)'),
    ],
)
def test_files_of_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / 'w.pth')
    with pytest.raises(ValueError, match=f'w.pth .*{message}'):
        load(tmp_path / 'w.pth')


def test_damaged_files(tmp_path):
    save(tmp_path / 'w.pth')
    whole = (tmp_path / 'w.pth').read_bytes()
    for content in (whole[: len(whole) // 2], b'', b'not a checkpoint'):
        (tmp_path / 'w.pth').write_bytes(content)
        with pytest.raises(ValueError, match=r'w.pth is damaged, .* Copy it again'):
            load(tmp_path / 'w.pth')


def test_a_file_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / 'ran').touch, ()

    (tmp_path / 'w.pth').write_bytes(pickle.dumps({'state_dict': Evil()}))
    with pytest.raises(ValueError, match='more than plain data'):
        load(tmp_path / 'w.pth')
    assert not (tmp_path / 'ran').exists()


def test_no_file(tmp_path):
    with pytest.raises(OSError, match=r'must name a file or URL .*, got .*none.pth'):
        load(tmp_path / 'none.pth')
