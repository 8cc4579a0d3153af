"""Several processes: on the CPU and joined by gloo, as on GPUs by NCCL."""

import json
import os
import sys

import pytest
import torch
from conftest import REPOSITORY, free_port
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import FlexibleRunner
from test_hooks import LOADER, Images, Model
from test_tools import TINY
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mmdgt import DGT, update_centroids
from mmdgt.models import DynamicGroupAttention
from mmdgt.openmmlab.apis.runner import build_runner
from mmdgt.openmmlab.checkpoints import load_weights

sys.path.insert(0, str(REPOSITORY / 'tools'))

import prove_resume

ARCH = dict(
    dims=(16, 32, 64, 64), depths=(1, 1, 2, 1), num_heads=(2, 2, 4, 4), stem_dims=8
)
CONFIG = f"""
_base_ = {str(REPOSITORY / 'configs/upernet_dgt_t_demo.py')!r}
custom_imports = dict(imports=['mmdgt', 'test_distributed'])
custom_hooks = [*_base_.custom_hooks, dict(type='SaveRankHook')]
model = dict(
    backbone=dict(arch=dict({ARCH}, _delete_=True)),
    decode_head=dict(in_channels={list(ARCH['dims'])}),
    auxiliary_head=dict(in_channels={ARCH['dims'][2]}),
)
"""


@HOOKS.register_module()
class SaveRankHook(Hook):
    """Saves what every process ended with; a checkpoint has rank 0 alone."""

    def after_train(self, runner):
        assert not runner.model.broadcast_buffers  # which would hide differences
        state = runner.model.module.state_dict()
        torch.save(state, f'{runner.work_dir}/rank{runner.rank}.pth')


@pytest.fixture(scope='module')
def trained(demo_data, run_tool, tmp_path_factory):
    """Three iterations of the demo config in two processes, from an empty folder."""
    folder = tmp_path_factory.mktemp('distributed')
    config = tmp_path_factory.mktemp('config') / 'tiny.py'
    config.write_text(CONFIG)

    def run(tool, *args):
        environment = dict(
            CUDA_VISIBLE_DEVICES='',
            # As torchrun sets it; with another number sums round otherwise.
            OMP_NUM_THREADS='1',
            PORT=str(free_port()),
            PYTHONPATH=os.pathsep.join(sys.path),  # to this file too
        )
        options = ('--cfg-options', f'data_root={demo_data}/ade20k', *TINY)
        return run_tool(tool, config, *args, *options, cwd=folder, **environment)

    settings = (
        'train_cfg.max_iters=3',
        'train_dataloader.batch_size=2',
        'default_hooks.logger.interval=1',
    )
    log = run('dist_train.sh', 2, '--work-dir', 'run', '--cfg-options', *settings)
    return run, folder / 'run', log.stdout + log.stderr


def test_processes_end_with_the_same_centroids(trained):
    _, work_dir, log = trained
    first, second = (torch.load(work_dir / f'rank{rank}.pth') for rank in range(2))
    differ = {key for key in first if not torch.equal(first[key], second[key])}
    # Each process saw its own images.
    assert differ == {key for key in first if 'running_' in key}
    assert sum('centroids' in key for key in first) == 4
    assert 'SyncBN becomes BN' in log


def test_names_in_the_log_are_those_of_one_process(trained):
    _, work_dir, _ = trained
    written = next(work_dir.rglob('scalars.json')).read_text()
    assert '"groups/backbone.stages.0.blocks.0.attention/live"' in written


def test_evaluation_in_parts_gives_the_figures_of_the_whole(trained):
    run, work_dir, _ = trained
    loader = 'test_dataloader.dataset'
    three = (  # An odd number: the second process gets one of them again.
        f'{loader}.indices=3',
        f'{loader}.data_prefix.img_path=images/training',
        f'{loader}.data_prefix.seg_map_path=annotations/training',
    )
    figures = []
    for tool, processes in (('dist_test.sh', [2]), ('test.py', [])):
        out = work_dir.with_name(tool)
        run(
            tool,
            work_dir / 'iter_3.pth',
            *processes,
            '--work-dir',
            out,
            '--cfg-options',
            *three,
        )
        figures.append(json.loads((out / 'metrics.json').read_text()))
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ('script', 'arguments'),
    [
        ('dist_train.sh', 'CONFIG GPUS'),
        ('dist_test.sh', 'CONFIG CHECKPOINT GPUS'),
        ('slurm_train.sh', 'PARTITION JOB_NAME CONFIG'),
        ('slurm_test.sh', 'PARTITION JOB_NAME CONFIG CHECKPOINT'),
    ],
)
def test_a_script_names_what_it_misses(run_tool, script, arguments):
    result = run_tool(script, *arguments.split()[1:], check=False)
    assert result.returncode == 2
    assert f'tools/{script} {arguments} [options' in result.stderr


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_what_slurm_is_asked_for(run_tool, tmp_path, tool):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    command = ['config.py', *['epoch.pth'] * (tool == 'test')]
    options = ['--amp', '--work-dir', 'a b']
    result = run_tool(
        f'slurm_{tool}.sh',
        *('gpu', 'dgt', *command, *options),
        PATH=f'{tmp_path}:{os.environ["PATH"]}',
        GPUS='16',
        SRUN_ARGS='--quiet --time=5',
    )
    asked = result.stdout.splitlines()
    program = asked.index(sys.executable)
    assert set(asked[:program]) == {
        '--partition=gpu',
        '--job-name=dgt',
        '--ntasks=16',
        '--ntasks-per-node=8',
        '--gres=gpu:8',
        '--cpus-per-task=5',
        *['--signal=TERM@300'] * (tool == 'train'),
        '--kill-on-bad-exit=1',
        '--quiet',
        '--time=5',
    }
    path = str(REPOSITORY / f'tools/{tool}.py')
    expected = ['-u', path, *command, '--launcher', 'slurm', *options]
    assert asked[program + 1 :] == expected


def train(images, out_indices):
    """One step for each of images (steps, B, 3, H, W), shared among the processes.

    Returns the centroids and the gradients of the last step. In float64, where no
    rounding decides on a group or a key.
    """
    torch.manual_seed(0)
    backbone = DGT(
        ARCH, num_groups=6, num_keys=10, out_indices=out_indices, norm_eval=True
    )
    model = backbone.double().train()
    if dist.is_initialized():
        images = images[:, dist.get_rank() :: 2]
        model = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in images:
        optimizer.zero_grad()
        losses = []
        for out in model(batch):
            weights = torch.linspace(-1, 1, out[0].numel()).view_as(out[0])
            losses.append((out * weights).flatten(1).sum(1).mean())
        sum(losses).backward()
        optimizer.step()
        update_centroids(model, keep=0.1)
    centroids = {k: x for k, x in backbone.named_buffers() if 'centroids' in k}
    return centroids, {k: p.grad for k, p in backbone.named_parameters()}


@pytest.mark.parametrize('out_indices', [(0,), (1,), (0, 2), (3,), (0, 1, 2, 3)])
def test_two_processes_equal_one_with_all_images(on_two_ranks, out_indices):
    """DDP would refuse the second step if a parameter had had no part in the first."""
    images = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    first, second = on_two_ranks(train, images, out_indices)
    centroids, gradients = expected = train(images, out_indices)
    assert centroids and gradients
    torch.testing.assert_close(first, expected)
    assert all(torch.equal(first[0][name], second[0][name]) for name in centroids)


def train_layer(batches):
    torch.manual_seed(0)
    layer = DynamicGroupAttention(16, 2, num_groups=4, num_keys=5).train()
    for batch in batches:
        if batch is not None:
            layer(batch)
        update_centroids(layer, keep=0.1)
    return layer.centroids


def train_layer_on_rank(batches):
    return train_layer(batches[dist.get_rank()])


@pytest.mark.parametrize('nothing', [None, torch.zeros(0, 20, 16)])
def test_a_process_without_queries_harms_nobody(on_two_ranks, nothing):
    images = torch.randn(2, 4, 20, 16)
    batches = ([images[0, :2], images[1]], [images[0, 2:], nothing])
    first, second = on_two_ranks(train_layer_on_rank, batches)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, train_layer(images))


def make_sharded(work_dir, max_iters, optimizer, **settings):
    return FlexibleRunner(
        model=make_model(),
        work_dir=str(work_dir),
        launcher='pytorch',
        strategy=dict(
            type='FullStateFSDPStrategy',
            model_wrapper=dict(
                type='MMFullyShardedDataParallel', device_id=torch.device('cpu')
            ),
        ),
        train_dataloader=LOADER,
        train_cfg=dict(by_epoch=False, max_iters=max_iters),
        optim_wrapper=dict(optimizer=optimizer),
        custom_hooks=[dict(type='CentroidHook'), dict(type='PlainCheckpointHook')],
        log_processor=dict(by_epoch=False),
        default_scope='mmengine',
        experiment_name=f'{work_dir}_{max_iters}',
        **settings,
    )


def train_sharded(work_dir):
    """Two iterations; the processes' shares of the parameters, and the buffers."""
    no_checkpoint = dict(checkpoint=None)
    sgd = dict(type='SGD', lr=2.0)
    runner = make_sharded(work_dir, 2, sgd, default_hooks=no_checkpoint)
    runner.train()
    size = sum(p.numel() for p in runner.model.parameters())
    return size, dict(runner.model.module.named_buffers())


def make_model():
    torch.manual_seed(0)
    model = Model()
    model.init_weights()
    model.backbone.norm_eval = True
    return model.train()


def test_fully_sharded_training_moves_centroids_as_one_process_does(
    on_two_ranks, tmp_path
):
    (size, first), (rest, second) = on_two_ranks(train_sharded, str(tmp_path))
    model = make_model()
    assert size and rest and size + rest == sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    images = torch.stack([Images()[i]['images'] for i in range(8)])
    for batch in images.chunk(2):
        optimizer.zero_grad()
        model(batch, mode='loss')['loss'].backward()
        optimizer.step()
        update_centroids(model, keep=0.1 * 2.0)
    for name, x in model.named_buffers():
        if 'centroids' in name:
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], x)


def save_sharded(work_dir, max_iters, resume):
    """Train in shares, save every iteration; returns a loss with the last weights."""
    checkpoint = dict(type='AtomicCheckpointHook', by_epoch=False, interval=1)
    runner = make_sharded(
        work_dir,
        max_iters,
        dict(type='AdamW', lr=0.05),
        resume=resume,
        default_hooks=dict(checkpoint=checkpoint),
        param_scheduler=dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=8),
    )
    runner.train()
    return evaluate(runner.model)


@torch.no_grad()
def evaluate(model):
    return model.eval()(Images()[0]['images'][None], mode='loss')['loss']


def test_fully_sharded_training_saves_and_resumes_in_one_piece(on_two_ranks, tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    on_two_ranks(save_sharded, whole, 4, False)
    on_two_ranks(save_sharded, parts, 2, False)
    loss, _ = on_two_ranks(save_sharded, parts, 4, True)
    expected, found = (
        torch.load(folder / 'iter_4.pth', weights_only=True)
        for folder in (whole, parts)
    )
    assert expected['optimizer']['state']
    for what in ('state_dict', 'optimizer', 'param_schedulers'):
        assert prove_resume.difference(expected[what], found[what]) is None
    model = make_model()
    load_weights(model, 'iter_4.pth', found['state_dict'])  # all, and finite
    torch.testing.assert_close(evaluate(model), loss)
    assert abs(loss - evaluate(make_model())) > 1e-3


def test_fsdp_in_a_runner_that_would_save_one_share_is_refused(tmp_path):
    cfg = Config(dict(model_wrapper_cfg=dict(type='MMFullyShardedDataParallel')))
    with pytest.raises(ValueError, match=r'must not be FSDP: .* FullStateFSDPStrategy'):
        build_runner(cfg)
