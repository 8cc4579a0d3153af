"""Checkpoints that are there when they are needed."""

import contextlib
import itertools
import os
import signal
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import (
    all_gather_object,
    get_rank,
    get_world_size,
    is_distributed,
    is_main_process,
)
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...files import PART, whole_file, write_text
from ...weights import not_finite, some
from .resume import SIGNALS, ResumableEpochLoop, random_state, set_random_state

INTERIM = 'interim_{}.pth'  # by its iteration; only the newest is kept
STATE = 'state_of_training'  # by this name in the message hub
IMPATIENT = 5  # seconds after which another Ctrl-C ends the process at once


class Interrupted(SystemExit):
    """A training was asked to stop and has saved: the process ends with status 0."""


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """Saves as mmengine's hook does, but so that something complete is always there.

    A checkpoint takes its name when it is complete and on the disk; then
    ``last_checkpoint`` names it, and only then are older ones removed. It holds what a
    run goes on from with the same bits, and no weight that is not finite.

    On SIGTERM or SIGINT it saves at the end of the iteration and ends the process with
    status 0; in validation at once, if it saved just before.

    Args:
        minutes (float, optional): Save after this many, too. Of such checkpoints, and
            of those that a signal caused, only one is kept, as ``interim_ITER.pth``,
            until any other is complete.
        **kwargs: As for mmengine's ``CheckpointHook``. ``out_dir`` must be a folder of
            this machine.
    """

    file_backend: Any  # mmengine's
    keep_ckpt_ids: deque[int]

    def __init__(self, *args: Any, minutes: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.minutes = minutes
        self.due = False
        self.received: tuple[int, float] | None = None  # the signal, and when
        self.handlers: dict[int, Any] = {}  # of others, while it listens
        self.before_validation: dict | None = None  # what was random, in training

    def before_train(self, runner: Runner) -> None:
        """Go on from the stored state, if there is one, and listen for signals."""
        if '://' in str(self.out_dir):
            raise ValueError(
                f'out_dir of AtomicCheckpointHook must be a folder of this machine, got'
                f' {self.out_dir}; for others take CheckpointHook'
            )
        super().before_train(runner)
        if is_main_process():
            for part in Path(self.out_dir).glob(f'{PART}*.pth'):  # of a killed process
                part.unlink()
        # Processes agree by the CPU, without waiting for the device.
        self.group = None
        if is_distributed():
            self.group = torch.distributed.new_group(backend='gloo')
        self.saved_at, self.saved_iter = time.monotonic(), runner.iter
        self.received = None
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self.handlers[number] = signal.signal(number, self._receive)
        if runner.iter and STATE in runner.message_hub.runtime_info:
            self._restore(runner, runner.message_hub.get_info(STATE))

    def after_train(self, runner: Runner) -> None:
        """Listen no longer."""
        self.stop_listening()
        super().after_train(runner)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Save if an iteration, the time or a signal says so.

        What falls between two steps of the optimizer waits for the next one: no
        checkpoint holds the gradients that are being summed up.
        """
        self.due |= super().every_n_train_iters(runner, self.interval, self.save_begin)
        if not runner.optim_wrapper.should_update():
            return
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        passed = time.monotonic() - self.saved_at
        due = self.minutes is not None and passed >= 60 * self.minutes
        stop, due = self._agree(self.received is not None, due)
        if stop or due:
            self._save_interim(runner, runner.iter + 1)
        if stop:
            self._leave(runner)

    def every_n_train_iters(self, *_: Any) -> bool:
        """Whether a checkpoint is due by its interval."""
        due, self.due = self.due, False
        return due

    def before_val(self, runner: Runner) -> None:
        """Save if training did not just do so, for validation may take long."""
        if not hasattr(self, 'group'):  # not in training
            return
        if runner.optim_wrapper.should_update():
            self._save_interim(runner, runner.iter)
        self.before_validation = random_state()
        # Of what all processes have: one of them may have a batch less.
        steps = len(runner.val_dataloader)
        self.steps_together = min(all_gather_object(steps))

    def after_val_iter(
        self, runner: Runner, batch_idx: int, *args: Any, **kwargs: Any
    ) -> None:
        """Leave on a signal, unless that would lose what was trained."""
        saved = self.before_validation and self.saved_iter == runner.iter
        together = saved and batch_idx < self.steps_together
        if together and self._agree(self.received is not None)[0]:
            self._leave(runner)

    def after_val(self, runner: Runner) -> None:
        """Let training draw as if there had been no validation."""
        if self.before_validation:
            set_random_state(self.before_validation)
            self.before_validation = None

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """Save under the name of the step, then remove what need not be kept."""
        outdated = []
        if self.max_keep_ckpts > 0:
            kept = [other for other in self.keep_ckpt_ids if other != step] + [step]
            outdated = kept[: -self.max_keep_ckpts]
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self._write(runner, self.filename_tmpl.format(step), meta)
        if is_main_process():
            for old in outdated:
                Path(self.out_dir, self.filename_tmpl.format(old)).unlink(True)

    def _save_checkpoint(self, runner: Runner) -> None:
        super()._save_checkpoint(_WholeFiles(runner))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Save the best, then remove the one before."""
        backend = self.file_backend
        self.file_backend = _RemovesLater(backend)
        super()._save_best_checkpoint(_WholeFiles(runner), metrics)
        self.file_backend.remove_now()
        self.file_backend = backend

    def _save_interim(self, runner: Runner, iteration: int) -> None:
        if iteration != self.saved_iter:
            meta = dict(epoch=runner.epoch, iter=iteration)
            self._write(_WholeFiles(runner), INTERIM.format(iteration), meta)

    def _write(self, runner: Runner, name: str, meta: dict) -> None:
        bad = not_finite(dict(runner.model.named_parameters()))
        # Under FSDP each process has a share: all of them stop, or none.
        if bad := list(dict.fromkeys(itertools.chain(*all_gather_object(bad)))):
            raise FloatingPointError(
                f'after iteration {meta["iter"]} these weights are not finite, so no'
                f' checkpoint is written: {some(bad)}. Go on from the last one with a'
                f' smaller learning rate, or with clip_grad in optim_wrapper'
            )
        file = Path(self.out_dir, name).absolute()
        self.last_ckpt = str(file)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        state = dict(
            sampler_seed=getattr(_sampler(runner), 'seed', None),
            random=all_gather_object(self.before_validation or random_state()),
        )
        if isinstance(runner.train_loop, ResumableEpochLoop):
            state['epoch'] = runner.train_loop.place()
        runner.message_hub.update_info(STATE, state)
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            **self.args,
        )
        if is_main_process():
            write_text(Path(runner.work_dir, 'last_checkpoint'), self.last_ckpt)
            for old in file.parent.glob(INTERIM.format('*')):
                if old != file:
                    old.unlink()
        self.saved_at, self.saved_iter = time.monotonic(), meta['iter']

    def _restore(self, runner: Runner, state: dict) -> None:
        if state['sampler_seed'] is not None:
            _sampler(runner).seed = state['sampler_seed']
        if isinstance(runner.train_loop, ResumableEpochLoop) and 'epoch' in state:
            runner.train_loop.go_on_from(**state['epoch'])
        if len(state['random']) != get_world_size():
            runner.logger.warning(
                f'The checkpoint is of {len(state["random"])} processes, this run has'
                f' {get_world_size()}: it goes on, but not as it would have'
            )
            return
        set_random_state(state['random'][get_rank()])

    def _agree(self, *flags: bool) -> list[bool]:
        """Which of the flags any process has raised."""
        if self.group is None:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(
            votes, torch.distributed.ReduceOp.MAX, group=self.group
        )
        return votes.bool().tolist()

    def _receive(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received = number, now
            # A log may be half-written just now; this is safe in a handler.
            os.write(2, b'\nA signal: saving at the end of the iteration.\n')
        elif number == signal.SIGINT and now - self.received[1] > IMPATIENT:
            raise KeyboardInterrupt

    def _leave(self, runner: Runner) -> None:
        self.stop_listening()
        runner.logger.warning(
            f'Interrupted; {self.last_ckpt} is complete. Go on with --resume'
        )
        raise Interrupted(0)

    def stop_listening(self) -> None:
        """Let signals do what they did before; also for those whom an error stops."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}


def _sampler(runner: Runner) -> Any:
    loader = runner.train_dataloader
    return getattr(loader.batch_sampler, 'sampler', loader.sampler)


class _WholeFiles:
    """A Runner that writes checkpoints whole or not at all."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def save_checkpoint(self, out_dir: str, filename: str, **kwargs: Any) -> None:
        file, main = Path(out_dir, filename), is_main_process()  # which alone writes
        with whole_file(file) if main else contextlib.nullcontext(file) as part:
            self.runner.save_checkpoint(str(part.parent), part.name, **kwargs)


class _RemovesLater:
    """A file back end that remembers what it was told to remove."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.later: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.later.append(path)

    def remove_now(self) -> None:
        for path in self.later:
            self.backend.remove(path)
