"""The hooks, in a Runner that trains a small backbone."""

import json

import loops
import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmdgt import DGT
from mmdgt.models import DynamicGroupAttention
from mmdgt.openmmlab.engine import group_usage

ARCH = dict(dims=(8, 8), depths=(1, 1), num_heads=(2, 2), stem_dims=8)


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.backbone = DGT(ARCH, num_groups=5, num_keys=6, out_indices=(1,))

    def forward(self, images, mode):
        out = self.backbone(images)[0]
        return {'loss': (out * torch.linspace(-1, 1, out.shape[-1])).mean()}


class Images(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {'images': torch.randn(3, 32, 32, generator=generator)}


LOADER = dict(
    batch_size=2,
    num_workers=0,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=Images(),
)


LINEAR = dict(type='LinearLR', start_factor=0.5, by_epoch=False, begin=0, end=4)
ONE_CYCLE = dict(
    type='OneCycleLR', eta_max=2.0, total_steps=4, by_epoch=False, begin=0, end=4
)


def make_runner(
    work_dir,
    max_iters=4,
    resume=False,
    hooks={},
    schedule=LINEAR,
    loop=None,
    **centroid_hook,
):
    torch.manual_seed(0)  # the model is built before the Runner seeds
    return Runner(
        randomness=dict(seed=0),
        model=Model(),
        work_dir=str(work_dir),
        train_dataloader=LOADER,
        train_cfg=loop or dict(type='IterBasedTrainLoop', max_iters=max_iters),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=2.0)),
        param_scheduler=schedule,
        default_hooks=dict(
            **dict(logger=dict(type='LoggerHook', interval=1)) | hooks,
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1),
        ),
        custom_hooks=[
            dict(type='CentroidHook', **centroid_hook),
            dict(type='PlainCheckpointHook'),
        ],
        log_processor=dict(by_epoch=False),
        default_scope='mmengine',
        resume=resume,
        experiment_name=f'{work_dir}_{max_iters}_{resume}_{len(centroid_hook)}',
    )


@pytest.mark.parametrize('mirrored', [False, True])
def test_tau_follows_the_schedule(tmp_path, mirrored):
    runner = make_runner(tmp_path, factor=0.1, mirrored=mirrored)
    layer = runner.model.backbone.stages[0].blocks[0].attention
    assert isinstance(layer, DynamicGroupAttention)
    seen = []  # queries and centroids of every iteration

    def record(layer, inputs):
        tokens = inputs[0].detach().flatten(1, 2)
        query = layer.qkv(tokens)[..., :8].unflatten(-1, (2, 4)).transpose(1, 2)
        seen.append(
            [x.detach().double().numpy().copy() for x in (query, layer.centroids)]
        )

    layer.register_forward_pre_hook(record)
    runner.train()
    final = layer.centroids.double().numpy()
    after = [centroids for _, centroids in seen[1:]] + [final]
    # The learning rate climbs from 0.5 * 2 to 2 within four iterations.
    for i, ((query, before), moved) in enumerate(zip(seen, after, strict=True)):
        tau = 0.1 * 2.0 * (0.5 + 0.5 * i / 3)
        means, counts = loops.mean_queries(query, loops.assign(query, before), 5)
        keep = 1 - tau if mirrored else tau
        expected = loops.move_centroids(before, means, counts, keep)
        np.testing.assert_allclose(moved, expected, atol=1e-5, err_msg=f'iteration {i}')


def test_group_usage_is_logged(tmp_path):
    runner = make_runner(tmp_path)
    runner.train()
    scalars = runner.message_hub.log_scalars
    for share in ('train/live_groups', 'train/largest_group'):
        assert 0 < scalars[share].current() <= 1
    written = next(tmp_path.rglob('scalars.json')).read_text()
    assert 'groups/backbone.stages.0.blocks.0.attention/live' in written
    assert 'groups/backbone.stages.0.blocks.0.attention/largest' in written


def steps(work_dir, name):
    """The iterations at which a scalar went to the visualizer."""
    lines = next(work_dir.rglob('scalars.json')).read_text().splitlines()
    return [line['step'] for line in map(json.loads, lines) if name in line]


@pytest.mark.parametrize(
    ('interval', 'ignore_last', 'expected'),
    [(3, True, [3, 7]), (3, False, [3, 4, 7, 8]), (9, True, [4, 8])],
)
def test_every_line_of_the_log_has_fresh_figures(
    tmp_path, interval, ignore_last, expected
):
    """Two epochs of four iterations."""
    logger = dict(type='LoggerHook', interval=interval, ignore_last=ignore_last)
    runner = make_runner(
        tmp_path,
        hooks=dict(logger=logger),
        loop=dict(type='EpochBasedTrainLoop', max_epochs=2),
    )
    runner.train()
    assert steps(tmp_path, 'loss') == expected
    attention = 'groups/backbone.stages.0.blocks.0.attention/live'
    assert steps(tmp_path, attention) == expected
    shares = runner.message_hub.log_scalars['train/live_groups']
    assert len(shares.data[0]) == len(expected)


@pytest.mark.parametrize('all_frozen', [False, True])
def test_layers_that_do_not_train_have_no_groups_to_report(tmp_path, all_frozen):
    runner = make_runner(tmp_path, max_iters=1)
    teacher = DGT(ARCH, num_groups=5, num_keys=6, out_indices=(1,)).eval()
    runner.model.teacher = teacher
    teacher.train = lambda mode=True: teacher
    if all_frozen:
        runner.model.backbone = teacher
        runner.model.weight = torch.nn.Parameter(torch.ones(()))
        runner.model.register_forward_hook(
            lambda model, _, out: {'loss': model.weight * out['loss']}
        )
    runner.train()
    scalars = runner.message_hub.log_scalars
    written = next(tmp_path.rglob('scalars.json')).read_text()
    assert 'groups/teacher' not in written
    assert ('train/live_groups' in scalars) != all_frozen
    if not all_frozen:
        assert scalars['train/live_groups'].current() > 0


def test_shares_of_groups():
    live, largest = group_usage(torch.tensor([[6, 2, 0, 0], [1, 1, 1, 1]]))
    assert (live, largest) == (0.75, 0.75)


def test_empty_groups_split_the_largest(tmp_path):
    runner = make_runner(tmp_path, max_iters=1, reseed=True)
    layer = runner.model.backbone.stages[0].blocks[0].attention
    runner.model.init_weights()
    # One centroid that every query prefers; the others stay empty.
    with torch.no_grad():
        layer.qkv.weight[:8] = 0
        layer.qkv.bias[:8] = torch.tensor([1.0, 0, 0, 0] * 2)
        layer.centroids[:] = torch.eye(4)[[0, 1, 1, 2, 3]]
    layer.qkv.requires_grad_(False)
    runner.train()
    towards = torch.tensor([1.0, 0, 0, 0])
    expected = towards + 0.1 * torch.eye(4)[[1, 1, 2, 3]]
    expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(layer.centroids[:, 0], towards.expand(2, 4))
    torch.testing.assert_close(layer.centroids[:, 1:], expected.expand(2, 4, 4))


def test_checkpoints_load_safely(tmp_path):
    make_runner(tmp_path, max_iters=2).train()
    checkpoint = torch.load(tmp_path / 'iter_2.pth', weights_only=True)
    history = checkpoint['message_hub']['log_scalars']['train/loss']
    assert len(history['log_history']) == 2
    assert any(key.endswith('centroids') for key in checkpoint['state_dict'])


def test_an_average_of_the_weights_has_the_centroids_of_now(tmp_path):
    """EMA, switched on as the classification schedule says."""
    ema = dict(type='EMAHook', momentum=0.25)
    runner = make_runner(tmp_path, hooks=dict(ema=ema))
    layer = runner.model.backbone.stages[0].blocks[0].attention
    weights = []  # before every iteration

    def record(layer, _):
        weights.append(layer.proj.weight.detach().double().clone())

    handle = layer.register_forward_pre_hook(record)
    runner.train()
    handle.remove()
    average = weights[1]  # The average starts at the first update.
    for weight in [*weights[2:], layer.proj.weight.detach().double()]:
        average = 0.75 * average + 0.25 * weight
    now = layer.centroids.clone()

    runner.call_hook('before_val_epoch')
    torch.testing.assert_close(layer.proj.weight.double(), average, rtol=0, atol=1e-6)
    assert torch.equal(layer.centroids, now)

    saved = torch.load(tmp_path / 'iter_4.pth', weights_only=True)['state_dict']
    name = 'backbone.stages.0.blocks.0.attention'
    torch.testing.assert_close(
        saved[f'{name}.proj.weight'].double(), average, rtol=0, atol=1e-6
    )
    assert torch.equal(saved[f'{name}.centroids'], now)


@pytest.mark.parametrize('schedule', [LINEAR, ONE_CYCLE])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, schedule):
    whole = make_runner(tmp_path / 'whole', schedule=schedule)
    whole.train()
    make_runner(tmp_path / 'parts', max_iters=2, schedule=schedule).train()
    rest = make_runner(tmp_path / 'parts', resume=True, schedule=schedule)
    started = []
    rest.model.backbone.stages[0].blocks[0].attention.register_forward_pre_hook(
        lambda layer, _: started.append(layer.centroids.clone())
    )
    rest.train()
    saved = torch.load(tmp_path / 'parts' / 'iter_2.pth', weights_only=True)
    name = 'backbone.stages.0.blocks.0.attention.centroids'
    assert torch.equal(started[0], saved['state_dict'][name])
    assert rest.iter == whole.iter == 4
    for key, x in whole.model.state_dict().items():
        torch.testing.assert_close(rest.model.state_dict()[key], x, msg=key)
    history = rest.message_hub.log_scalars['train/loss']
    assert len(history.data[0]) == 4
