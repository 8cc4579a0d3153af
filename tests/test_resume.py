"""Whatever ends a training, it goes on with the bits it would have had."""

import os
import random
import shutil
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop
from test_hooks import ARCH, LOADER, Images
from torch import distributed as dist
from torch import nn

from mmdgt import DGT
from mmdgt.openmmlab import checkpoints
from mmdgt.openmmlab.apis.runner import CPURunner, StrictRunner
from mmdgt.openmmlab.engine import Interrupted, resume

sys.path.insert(0, str(REPOSITORY / 'tools'))

import prove_resume

EPOCHS = dict(by_epoch=True, max_epochs=2)  # of four iterations
ITERATIONS = dict(by_epoch=False, max_iters=8)


class Augmented(Images):
    """Augments with all three generators that transforms use."""

    def __getitem__(self, index):
        noise = torch.rand(3, 32, 32) + np.random.rand() * random.random()
        return {'images': super().__getitem__(index)['images'] * noise}


class Model(torch.nn.Module):
    """Draws in the main process too."""

    def __new__(cls):
        from mmengine.model import BaseModel

        class Dropping(BaseModel):
            def __init__(self):
                super().__init__()
                self.backbone = DGT(
                    ARCH,
                    num_groups=5,
                    num_keys=6,
                    out_indices=(1,),
                    drop_path_rate=0.3,
                )
                self.drop = nn.Dropout(0.2)

            def forward(self, images, mode):
                out = self.drop(self.backbone(images)[0])
                if mode == 'predict':
                    return [out]
                weight = np.random.rand() + random.random()
                return {'loss': weight * out.float().sin().mean()}

        return Dropping()


class InterruptAt(Hook):
    """Sends a signal, or fails, in an iteration."""

    def __init__(self, iteration, number):
        self.iteration, self.number = iteration, number

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            if self.number is None:
                raise RuntimeError('killed')
            os.kill(os.getpid(), self.number)


def make(
    work_dir, loop=ITERATIONS, hooks=(), resume=False, runner=StrictRunner, **settings
):
    torch.manual_seed(0)
    by_epoch, workers = loop['by_epoch'], settings.pop('workers', 0)
    batch_size = settings.pop('batch_size', 2)
    optim = settings.pop('optim', dict(type='BFloat16OptimWrapper'))
    checkpoint = dict(
        type='AtomicCheckpointHook', by_epoch=by_epoch, interval=1 if by_epoch else 3
    )
    checkpoint.update(settings.pop('checkpoint', {}))
    make.count = getattr(make, 'count', 0) + 1  # Loggers are told apart by the name.
    return runner(
        model=Model(),
        work_dir=str(work_dir),
        randomness=dict(seed=3),
        train_dataloader=dict(
            batch_size=batch_size,
            num_workers=workers,
            persistent_workers=bool(workers),
            collate_fn=dict(type='default_collate'),
            sampler=dict(
                type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=True
            ),
            dataset=Augmented(),
        ),
        train_cfg=dict(loop),
        optim_wrapper=dict(optim, optimizer=dict(type='AdamW', lr=0.01)),
        param_scheduler=dict(
            type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=8
        ),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=checkpoint,
            ema=dict(type='EMAHook', momentum=0.25),
        ),
        custom_hooks=[
            dict(type='CentroidHook', reseed=True),
            dict(type='PlainCheckpointHook'),
            *hooks,
        ],
        log_processor=dict(by_epoch=by_epoch),
        default_scope='mmengine',
        resume=resume,
        experiment_name=f'{work_dir}_{make.count}',
        **settings,
    )


def final(work_dir, name='iter_8.pth'):
    return prove_resume.state_of(work_dir / name)


def assert_same_bits(one, other):
    assert prove_resume.difference(one, other) is None


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The folders of runs that nothing interrupted, by their loop."""
    folders = {}
    for loop in (EPOCHS, ITERATIONS):
        folders[loop['by_epoch']] = folder = tmp_path_factory.mktemp('whole')
        make(folder, loop).train()
    return folders


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('loop', [EPOCHS, ITERATIONS])
@pytest.mark.parametrize('iteration', [2, 5])
def test_a_signal_saves_and_the_run_goes_on_to_the_bit(
    tmp_path, whole, workers, loop, iteration
):
    number = signal.SIGTERM if workers else signal.SIGINT
    handler = signal.getsignal(number)
    stop = InterruptAt(iteration, number)
    with pytest.raises(Interrupted) as left:
        make(tmp_path, loop, [stop], workers=workers).train()
    assert left.value.code == 0
    assert signal.getsignal(number) == handler
    interim = tmp_path / f'interim_{iteration + 1}.pth'
    saved = (tmp_path / 'last_checkpoint').read_text()
    if not loop['by_epoch'] and (iteration + 1) % 3 == 0:
        interim = tmp_path / f'iter_{iteration + 1}.pth'
    assert saved == str(interim) and interim.is_file()
    rest = make(tmp_path, loop, resume=True, workers=workers)
    rest.train()
    name = 'epoch_2.pth' if loop['by_epoch'] else 'iter_8.pth'
    assert_same_bits(final(tmp_path, name), final(whole[loop['by_epoch']], name))
    assert not list(tmp_path.glob('interim_*'))


@pytest.mark.parametrize('number', [signal.SIGTERM, None])
@pytest.mark.parametrize('forked', [False, True])
def test_the_process_ends_with_its_workers(tmp_path, number, forked):
    """After a signal with status 0, after an error with another; it never hangs."""
    hook = f'test_resume.InterruptAt(2, {number and int(number)})'
    make = f'test_resume.make({str(tmp_path)!r}, hooks=[{hook}], workers=2)'
    start = 'train()'
    if forked:  # as by torch.multiprocessing
        start = 'p = Process(target=train); p.start(); p.join(); exit(p.exitcode)'
    code = f"""
from multiprocessing import Process
import test_resume
def train():
    {make}.train()
{start}"""
    paths = [str(REPOSITORY / 'tests'), *sys.path]
    ended = subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths)},
        timeout=300,
        capture_output=True,
    )
    assert ended.returncode == (0 if number else 1)


@pytest.mark.parametrize('loop', [EPOCHS, ITERATIONS])
def test_after_a_crash_it_goes_on_from_the_last_that_was_saved(tmp_path, whole, loop):
    handlers = [signal.getsignal(number) for number in resume.SIGNALS]
    with pytest.raises(RuntimeError, match='killed'):
        make(tmp_path, loop, [InterruptAt(5, None)]).train()
    assert [signal.getsignal(number) for number in resume.SIGNALS] == handlers
    make(tmp_path, loop, resume=True).train()
    name = 'epoch_2.pth' if loop['by_epoch'] else 'iter_8.pth'
    assert_same_bits(final(tmp_path, name), final(whole[loop['by_epoch']], name))


@pytest.mark.parametrize('loop', [EPOCHS, ITERATIONS])
def test_what_was_trained_on_is_not_loaded_again(tmp_path, monkeypatch, loop):
    loaded = []

    def load(self, index, load=Augmented.__getitem__):
        loaded.append(index)
        return load(self, index)

    monkeypatch.setattr(Augmented, '__getitem__', load)
    with pytest.raises(RuntimeError, match='killed'):
        make(tmp_path, loop, [InterruptAt(6, None)]).train()
    saved = 4 if loop['by_epoch'] else 6  # the iteration
    loaded.clear()
    make(tmp_path, loop, resume=True).train()
    assert len(loaded) == 2 * (8 - saved)


@pytest.mark.parametrize('iteration', [3, 4, 5])
@pytest.mark.parametrize('batch_size', [1, 2, 3, 4, 5])
def test_another_batch_size_goes_on_with_the_rest_of_the_epoch(
    tmp_path, monkeypatch, iteration, batch_size
):
    """At the end of the first of three, at the start of the second and within it."""
    loop, trained = dict(EPOCHS, max_epochs=3), []

    def load(self, index, load=Augmented.__getitem__):
        trained.append(index)
        return load(self, index)

    monkeypatch.setattr(Augmented, '__getitem__', load)
    stop = InterruptAt(iteration, signal.SIGTERM)
    with pytest.raises(Interrupted):
        make(tmp_path, loop, [stop]).train()
    left = make(tmp_path, loop, resume=True, batch_size=batch_size)
    behind = len(trained) % 8
    again = behind % batch_size  # what a batch has in common with those before
    left.train()
    assert len(trained) == 24 + again
    epochs = trained[:8], trained[8 : 16 + again], trained[16 + again :]
    for epoch in epochs:
        assert sorted(set(epoch)) == list(range(8))
    log = next(tmp_path.glob(f'{left.timestamp}*/*.log')).read_text()
    told = f'with 2 samples, this run has {-(-8 // batch_size)} with {batch_size}:'
    assert (told in log) == (batch_size != 2)


def test_after_another_batch_size_it_goes_on_again(tmp_path):
    """Where epochs do not begin with a multiple of their length."""
    loop = dict(EPOCHS, max_epochs=3)
    for name, iteration in (('whole', None), ('parts', 6)):
        folder = tmp_path / name
        make(folder, dict(EPOCHS, max_epochs=1)).train()
        stop = [] if iteration is None else [InterruptAt(iteration, signal.SIGTERM)]
        try:
            make(folder, loop, stop, resume=True, batch_size=1).train()
        except Interrupted:
            make(folder, loop, resume=True, batch_size=1).train()
    assert_same_bits(*(final(tmp_path / x, 'epoch_3.pth') for x in ('whole', 'parts')))


@pytest.mark.parametrize('epochs', [1, 3])
@pytest.mark.parametrize('batch_size', [1, 4, 8])
def test_a_checkpoint_of_another_hook_and_batch_size(tmp_path, batch_size, epochs):
    """Where nothing tells the place, the epoch begins anew."""
    plain, loops = (
        dict(type='CheckpointHook'),
        (
            dict(EPOCHS, max_epochs=epochs),
            dict(EPOCHS, max_epochs=epochs + 1),
        ),
    )
    make(tmp_path, loops[0], checkpoint=plain).train()
    rest = make(
        tmp_path, loops[1], checkpoint=plain, resume=True, batch_size=batch_size
    )
    rest.train()
    assert rest.iter == rest.max_iters == 4 * epochs + 8 // batch_size


def test_a_checkpoint_of_another_hook_within_an_epoch(tmp_path):
    """It is said that the epoch begins anew."""
    plain = dict(type='CheckpointHook', by_epoch=False, interval=3)
    killed = [InterruptAt(6, None)]
    with pytest.raises(RuntimeError, match='killed'):
        make(tmp_path, EPOCHS, killed, checkpoint=plain).train()
    (tmp_path / 'iter_6.pth').unlink()
    rest = make(tmp_path, EPOCHS, resume=True, checkpoint=plain)
    rest.train()
    log = next(tmp_path.glob(f'{rest.timestamp}*/*.log')).read_text()
    assert rest.iter == 3 + 8 and 'within an epoch, that begins anew' in log


@pytest.mark.parametrize('iteration', [4, 6])
@pytest.mark.parametrize('batch_size', [1, 4])
def test_gradients_are_summed_with_another_batch_size(
    tmp_path, monkeypatch, iteration, batch_size
):
    """Two to a step, and a last one to its own if they are odd."""
    from mmengine.optim import OptimWrapper

    loop = dict(EPOCHS, max_epochs=3)
    settings = dict(optim=dict(type='OptimWrapper', accumulative_counts=2))
    stop = InterruptAt(iteration, signal.SIGTERM)
    with pytest.raises(Interrupted):
        make(tmp_path, loop, [stop], **settings).train()
    factors, steps = [], []
    scale_loss, step = OptimWrapper.scale_loss, OptimWrapper.step

    def scale(self, loss):
        scaled = scale_loss(self, loss)
        factors.append((loss / scaled).item())
        return scaled

    def count(self, **kwargs):
        steps.append(len(factors))
        step(self, **kwargs)

    monkeypatch.setattr(OptimWrapper, 'scale_loss', scale)
    monkeypatch.setattr(OptimWrapper, 'step', count)
    rest = make(tmp_path, loop, resume=True, batch_size=batch_size, **settings)
    rest.train()
    assert rest.iter == rest.max_iters
    pairs, odd = divmod(len(factors), 2)
    assert factors == [pytest.approx(x) for x in pairs * [2, 2] + odd * [1]]
    assert steps == [2 * (i + 1) for i in range(pairs)] + odd * [len(factors)]


def test_a_checkpoint_waits_for_the_step(tmp_path):
    """Three gradients to a step, a checkpoint every four iterations."""
    settings = dict(
        optim=dict(type='OptimWrapper', accumulative_counts=3),
        checkpoint=dict(interval=4),
    )
    make(tmp_path / 'whole', **settings).train()
    with pytest.raises(RuntimeError, match='killed'):
        make(tmp_path / 'run', hooks=[InterruptAt(7, None)], **settings).train()
    assert [file.name for file in (tmp_path / 'run').glob('*.pth')] == ['iter_6.pth']
    make(tmp_path / 'run', resume=True, **settings).train()
    assert_same_bits(final(tmp_path / 'run'), final(tmp_path / 'whole'))


@pytest.fixture
def float16(monkeypatch):
    """mmengine's float16 with a scaler, on the CPU; the scale grows at every step."""
    from mmengine.optim.optimizer import amp_optimizer_wrapper

    scaler = partial(torch.amp.GradScaler, device='cpu')
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', scaler)

    class Float16(amp_optimizer_wrapper.AmpOptimWrapper):
        def optim_context(self, model):
            return torch.autocast('cpu', torch.float16)

    return dict(
        type=Float16, loss_scale=dict(init_scale=2.0**13, growth_interval=1, enabled=1)
    )


def test_the_scale_of_float16_goes_on(tmp_path, float16):
    """It overflows on the way, and steps are left out."""
    make(tmp_path / 'whole', optim=float16).train()
    with pytest.raises(RuntimeError, match='killed'):
        make(tmp_path / 'run', hooks=[InterruptAt(5, None)], optim=float16).train()
    make(tmp_path / 'run', resume=True, optim=float16).train()
    expected = final(tmp_path / 'whole')
    assert_same_bits(final(tmp_path / 'run'), expected)
    scaler = expected['optimizer']['loss_scaler']
    steps = {int(x['step']) for x in expected['optimizer']['state'].values()}
    assert scaler['scale'] != 2.0**13
    assert steps and max(steps) < 8, (steps, scaler)


def validation(folder):
    """Settings of a Runner that validates every second iteration."""
    return dict(
        loop=dict(ITERATIONS, val_interval=2),
        val_dataloader=dict(
            batch_size=1,
            num_workers=0,
            collate_fn=dict(type='default_collate'),
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=Augmented(),
        ),
        val_cfg=dict(),
        val_evaluator=dict(type='DumpResults', out_file_path=str(folder / 'x.pkl')),
    )


def test_validation_does_not_change_what_training_draws(tmp_path, whole):
    """So that a run that is resumed behind a validation needs none."""
    make(tmp_path, **validation(tmp_path)).train()
    assert_same_bits(final(tmp_path), final(whole[False]))


class InterruptValidation(Hook):
    """Sends a signal before every batch."""

    seen = 0

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        self.seen += 1
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_in_validation_leaves_what_was_saved_before(tmp_path, whole):
    stop = InterruptValidation()
    with pytest.raises(Interrupted):
        make(tmp_path, hooks=[stop], **validation(tmp_path)).train()
    assert stop.seen == 1
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'interim_2.pth')
    make(tmp_path, resume=True, **validation(tmp_path)).train()
    assert_same_bits(final(tmp_path), final(whole[False]))


def test_a_signal_in_validation_waits_where_nothing_was_saved(tmp_path):
    """Gradients of iteration 4 are being summed up: the step is after the sixth."""
    settings = dict(optim=dict(type='OptimWrapper', accumulative_counts=3))
    settings |= validation(tmp_path)
    settings['loop'] = dict(ITERATIONS, val_interval=4)
    make(tmp_path / 'whole', **settings).train()
    stop = InterruptValidation()
    with pytest.raises(Interrupted):
        make(tmp_path, hooks=[stop], **settings).train()
    assert stop.seen == len(Augmented())
    last = (tmp_path / 'last_checkpoint').read_text()
    assert last == str(tmp_path / 'iter_6.pth')
    make(tmp_path, resume=True, **settings).train()
    assert_same_bits(final(tmp_path), final(tmp_path / 'whole'))


class Counted(BaseMetric):
    """Better every time."""

    times = 0

    def process(self, data_batch, data_samples):
        self.results.append(None)

    def compute_metrics(self, results):
        self.times += 1
        return {'score': self.times}


def test_what_is_saved_behind_a_validation_draws_as_if_there_was_none(tmp_path, whole):
    settings = dict(validation(tmp_path), val_evaluator=dict(type=Counted))
    settings['loop'] = dict(ITERATIONS, val_interval=3)
    settings['checkpoint'] = dict(save_best='score', rule='greater')
    with pytest.raises(RuntimeError, match='killed'):
        make(tmp_path, hooks=[InterruptAt(4, None)], **settings).train()
    assert (tmp_path / 'best_score_iter_3.pth').is_file()
    make(tmp_path, resume=True, **settings).train()
    assert_same_bits(final(tmp_path), final(whole[False]))


@pytest.mark.parametrize(
    'kind', [IterBasedTrainLoop, 'IterBasedTrainLoop', 'mmengine.IterBasedTrainLoop']
)
def test_a_loop_by_its_name_or_class(tmp_path, kind):
    runner = make(tmp_path)
    loop = runner.build_train_loop(dict(type=kind, max_iters=8))
    assert isinstance(loop, resume.ResumableIterLoop)
    assert runner.build_train_loop(loop) is loop


def test_a_hook_may_switch_the_pipeline(tmp_path):
    """As mmdet's PipelineSwitchHook does for the last epochs."""

    seen = []

    class Switched(Augmented):
        pipeline = 'first'

        def __getitem__(self, index):
            seen.append(self.pipeline)
            return super().__getitem__(index)

    class Switch(Hook):
        def before_train_epoch(self, runner):
            if runner.epoch == 1:
                runner.train_dataloader.dataset.pipeline = 'second'

    runner = make(tmp_path, EPOCHS, hooks=[Switch()])
    runner._train_dataloader['dataset'] = Switched()
    runner.train()
    assert seen == ['first'] * 8 + ['second'] * 8


def test_samples_do_not_depend_on_workers():
    loader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=Augmented(),
        collate_fn=dict(type='default_collate'),
    )
    batches = [
        [
            batch['images']
            for batch in StrictRunner.build_dataloader(
                resume.resumable(dict(loader, num_workers=workers)), seed=1
            )
        ]
        for workers in (0, 1, 3)
    ]
    for others in batches[1:]:
        assert_same_bits(batches[0], others)
    assert not torch.equal(batches[0][0][0], batches[0][0][1])


class Cores(Images):
    """On how many the process that loads may run."""

    def __getitem__(self, index):
        return len(os.sched_getaffinity(0))


def test_workers_leave_the_core_of_a_bound_main_thread(monkeypatch):
    everywhere = os.sched_getaffinity(0)
    loader = dict(LOADER, batch_size=8, num_workers=1, dataset=Cores())
    monkeypatch.setenv('OMP_PROC_BIND', 'true')
    os.sched_setaffinity(0, {min(everywhere)})
    try:
        (cores,) = StrictRunner.build_dataloader(loader)
    finally:
        os.sched_setaffinity(0, everywhere)
    assert min(cores) >= len(everywhere)


def test_minutes(tmp_path):
    """With no minute between them every iteration saves, and one is kept."""
    seen = []

    class Look(Hook):
        priority = 'LOWEST'

        def after_train_iter(self, runner, *args, **kwargs):
            seen.append(sorted(file.name for file in tmp_path.glob('*.pth')))

    checkpoint = dict(minutes=0, interval=3, max_keep_ckpts=1)
    loop = dict(ITERATIONS, max_iters=5)
    make(tmp_path, loop, [Look()], checkpoint=checkpoint).train()
    assert seen == [
        ['interim_1.pth'],
        ['interim_2.pth'],
        ['iter_3.pth'],
        ['interim_4.pth', 'iter_3.pth'],
        ['iter_5.pth'],
    ]


def test_the_last_checkpoint_is_removed_when_the_next_is_complete(
    tmp_path, monkeypatch
):
    """A disk that is full when the second is written leaves the first."""
    save, saved = torch.save, []

    def full(data, file):
        saved.append(data)
        if len(saved) == 2:
            file.write(b'half')
            raise OSError('no space left on device')
        save(data, file)

    monkeypatch.setattr(torch, 'save', full)
    checkpoint = dict(max_keep_ckpts=1, interval=1)
    with pytest.raises(OSError, match='no space left'):
        make(tmp_path, checkpoint=checkpoint).train()
    assert [file.name for file in tmp_path.glob('*.pth')] == ['iter_1.pth']
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_1.pth')
    checkpoints.check_resumable('x', torch.load(tmp_path / 'iter_1.pth'))


def test_what_a_killed_process_left_is_tidied_up(tmp_path):
    part = tmp_path / '.part-0123abcd-iter_3.pth'
    part.write_bytes(b'half')
    make(tmp_path, dict(ITERATIONS, max_iters=1)).train()
    assert not part.exists()


def test_resume_passes_over_what_is_not_complete(tmp_path, whole, caplog):
    make(tmp_path, dict(ITERATIONS, max_iters=6)).train()
    for name, content in (('iter_7.pth', b'half'), ('iter_8.pth', b'')):
        (tmp_path / name).write_bytes(content)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'gone.pth'))
    assert checkpoints.newest_checkpoint(tmp_path) == tmp_path / 'iter_6.pth'
    rest = make(tmp_path, resume=True)
    rest.train()
    log = next(tmp_path.glob(f'{rest.timestamp}*/*.log')).read_text()
    assert f'Going on from {tmp_path}/iter_6.pth' in log
    assert_same_bits(final(tmp_path), final(whole[False]))


def test_the_copy_of_a_work_dir_goes_on_by_itself(tmp_path):
    """Though last_checkpoint names the original, which has trained further."""
    original, copy = tmp_path / 'original', tmp_path / 'copy'
    make(original, dict(ITERATIONS, max_iters=3)).train()
    shutil.copytree(original, copy)
    make(original, resume=True).train()
    assert checkpoints.newest_checkpoint(copy) == copy / 'iter_3.pth'


def test_a_difference_is_found():
    """What the other tests compare with."""
    state = dict(a=[torch.ones(3), 2], b=dict(c=1.0))
    assert prove_resume.difference(state, state) is None
    for changed, where in (
        (dict(state, a=[torch.tensor([1.0, 1.0, 1.0000001]), 2]), '/a/0'),
        (dict(state, a=[torch.ones(3), 3]), '/a/1'),
        (dict(state, b=dict(d=1.0)), '/b'),
        (dict(state, a=[torch.ones(3)]), '/a'),
    ):
        assert prove_resume.difference(state, changed) == where


def test_another_number_of_processes_goes_on_with_a_warning(tmp_path):
    make(tmp_path, dict(ITERATIONS, max_iters=3)).train()
    saved = torch.load(tmp_path / 'iter_3.pth', weights_only=True)
    saved['message_hub']['runtime_info']['state_of_training']['random'] *= 2
    torch.save(saved, tmp_path / 'iter_3.pth')
    rest = make(tmp_path, resume=True)
    rest.train()
    log = next(tmp_path.glob(f'{rest.timestamp}*/*.log')).read_text()
    assert 'The checkpoint is of 2 processes, this run has 1' in log
    assert (tmp_path / 'iter_8.pth').is_file()


def test_nothing_to_resume(tmp_path):
    assert checkpoints.newest_checkpoint(tmp_path) is None
    make(tmp_path, dict(ITERATIONS, max_iters=1), resume=True).train()
    assert (tmp_path / 'iter_1.pth').is_file()
    (tmp_path / 'iter_1.pth').write_bytes(b'half')
    with pytest.raises(ValueError, match='none of its 1 will do'):
        make(tmp_path, resume=True).train()


class Look(Hook):
    """Remembers the weights that training starts with, and where."""

    def before_train(self, runner):
        state = runner.model.state_dict()
        self.seen = runner.iter, {key: x.clone() for key, x in state.items()}


def test_with_nothing_to_resume_it_starts_from_the_weights_of_the_config(tmp_path):
    """Of a job that always says --resume."""
    make(tmp_path / 'other', dict(ITERATIONS, max_iters=1)).train()
    file = str(tmp_path / 'other/iter_1.pth')
    other = torch.load(file, weights_only=True)['state_dict']
    job = dict(resume='auto', load_from=file)
    start, rest = Look(), Look()
    runner = make(tmp_path / 'run', dict(ITERATIONS, max_iters=3), hooks=[start], **job)
    runner.train()
    iteration, state = start.seen
    assert iteration == 0
    assert_same_bits(state, dict(other))
    log = next((tmp_path / 'run').glob(f'{runner.timestamp}*/*.log')).read_text()
    assert f'No checkpoint in {tmp_path}/run: training starts anew from {file}' in log
    make(tmp_path / 'run', hooks=[rest], **job).train()
    assert rest.seen[0] == 3


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    class Break(Hook):
        priority = 'LOW'

        def after_train_iter(self, runner, *args, **kwargs):
            if runner.iter == 5:
                runner.model.backbone.stem[0].weight.data[0] = float('nan')

    with pytest.raises(FloatingPointError, match=r'iteration 6 .*backbone\.stem\.0\.w'):
        make(tmp_path, hooks=[Break()]).train()
    assert [file.name for file in tmp_path.glob('*.pth')] == ['iter_3.pth']


def test_the_best_is_removed_when_the_next_is_complete(tmp_path, monkeypatch):
    hook = make(tmp_path, checkpoint=dict(save_best='score', rule='greater'))
    hook.train_loop.dataloader  # noqa: B018  # what training would build
    hook.optim_wrapper = hook.build_optim_wrapper(hook.optim_wrapper)
    hook.param_schedulers = hook.build_param_scheduler(hook.param_schedulers)
    hook.call_hook('before_run')
    hook.call_hook('before_train')
    (saves,) = (h for h in hook.hooks if type(h).__name__ == 'AtomicCheckpointHook')
    saves.after_val_epoch(hook, dict(score=1.0))
    (first,) = tmp_path.glob('best_*.pth')
    hook.train_loop._iter = 1
    save = torch.save

    def full(data, file):
        assert first.is_file()
        save(data, file)

    monkeypatch.setattr(torch, 'save', full)
    saves.after_val_epoch(hook, dict(score=2.0))
    assert [file.name for file in tmp_path.glob('best_*')] == ['best_score_iter_1.pth']
    saves.after_train(hook)


class JoinedRunner(CPURunner):
    """Its processes have been joined already."""

    def setup_env(self, env_cfg):
        StrictRunner.setup_env(self, env_cfg)


class Fewer(Augmented):
    """Not a multiple of two."""

    def __len__(self):
        return 5


def validate_rank(folder):
    """A run in this process of two, of which one validates a batch more."""
    settings = validation(folder)
    settings['val_dataloader']['dataset'] = Fewer()
    settings['val_dataloader']['sampler']['round_up'] = False
    settings['val_evaluator'] = dict(type=Counted)
    runner = make(folder, runner=JoinedRunner, launcher='pytorch', **settings)
    runner.train()
    return len(runner.val_dataloader)


def test_two_processes_with_an_uneven_validation(on_two_ranks, tmp_path):
    assert sorted(on_two_ranks(validate_rank, tmp_path)) == [2, 3]


def samples_of_rank(folder):
    """Of an iteration of all processes, as this one counts them."""
    runner = make(folder, EPOCHS, runner=JoinedRunner, launcher='pytorch')
    return runner.build_train_loop(dict(EPOCHS)).place()['samples']


def test_the_place_counts_the_samples_of_all_processes(on_two_ranks, tmp_path):
    assert on_two_ranks(samples_of_rank, tmp_path) == [4, 4]


def run_rank(folder, iteration, resumed):
    """A run in this process of two; the signal reaches one of them alone."""
    stop = [InterruptAt(iteration, signal.SIGTERM)] if dist.get_rank() else []
    hooks = stop if iteration is not None else []
    runner = make(
        folder, hooks=hooks, resume=resumed, runner=JoinedRunner, launcher='pytorch'
    )
    try:
        runner.train()
    except Interrupted:
        return f'left at {runner.iter}'
    return 'done'


def test_two_processes(on_two_ranks, tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    assert on_two_ranks(run_rank, whole, None, False) == ['done'] * 2
    assert on_two_ranks(run_rank, parts, 4, False) == ['left at 4'] * 2
    assert on_two_ranks(run_rank, parts, None, True) == ['done'] * 2
    assert_same_bits(final(parts), final(whole))
    states = final(whole)['random']['random']
    assert len(states) == 2


@pytest.mark.parametrize(
    'base', ['classification_300e', 'detection_1x', 'segmentation_160k']
)
def test_the_long_recipes_save_by_minutes(base):
    from mmengine.config import Config

    cfg = Config.fromfile(REPOSITORY / f'configs/_base_/schedules/{base}.py')
    assert cfg.default_hooks.checkpoint.minutes <= 30
