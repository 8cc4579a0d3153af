"""The Runner of the command-line tools, with and without GPUs."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import (
    barrier,
    broadcast_object_list,
    get_backend,
    is_distributed,
    is_main_process,
)
from mmengine.model import (
    BaseTTAModel,
    MMDistributedDataParallel,
    is_model_wrapper,
    revert_sync_batchnorm,
)
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from ...weights import weights_of
from ..checkpoints import (
    check_resumable,
    load_weights,
    newest_checkpoint,
    read_checkpoint,
    secure_framework,
)
from ..engine.checkpointing import AtomicCheckpointHook
from ..engine.resume import RESUMABLE, resumable, steady
from ..picture_files import check_pictures


def build_runner(cfg: Config) -> Runner:
    """Build the Runner that a config describes.

    Args:
        cfg (Config): Its ``launcher`` says how the processes were started. Those of
            torchrun need no GPU: without one they run on the CPU.

    Raises:
        ValueError: If it shards the model over the processes.
    """
    secure_framework()
    wrapper = (cfg.get('model_wrapper_cfg') or {}).get('type', '')
    if 'FullyShardedDataParallel' in str(wrapper):
        raise ValueError(
            'model_wrapper_cfg must not be FSDP: the checkpoints of this Runner would'
            " hold the share of one process. Leave it out for DDP, or take mmengine's"
            ' FlexibleRunner with the strategy FullStateFSDPStrategy'
        )
    on_cpu = cfg.launcher == 'pytorch' and get_device() == 'cpu'
    return (CPURunner if on_cpu else StrictRunner).from_cfg(cfg)


def leave_processes() -> None:
    """Part from the other processes, if there are any; the last thing a tool does.

    Processes joined by gloo end here and skip the end of the interpreter, at which
    threads of theirs have been seen to abort them, with all the work done.
    """
    if not is_distributed():
        return
    by_gloo = get_backend() == 'gloo'
    barrier()
    torch.distributed.destroy_process_group()
    if by_gloo:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class StrictRunner(Runner):
    """A Runner that takes a checkpoint whole or not at all, and goes on to the bit.

    mmengine's unpickles what it cannot read safely and loads what fits. ``trust`` and
    ``allow_partial`` of the config allow the one and the other.
    """

    _train_dataloader: Any  # mmengine's
    _load_from: str | None
    _resume: bool | str
    _goes_on = False  # while it reads what a training goes on from

    @staticmethod
    def build_dataloader(*args: Any, **kwargs: Any) -> DataLoader:
        """Build a data loader that neither signals nor other loaders disturb."""
        return steady(Runner.build_dataloader(*args, **kwargs))

    def train(self) -> nn.Module:
        """Train; whatever ends it, signals do then what they did before."""
        try:
            return super().train()
        finally:
            for hook in self.hooks:
                if isinstance(hook, AtomicCheckpointHook):
                    hook.stop_listening()

    def build_train_loop(self, loop: dict | BaseLoop) -> BaseLoop:
        """Build the loop so that it can go on anywhere, and look at its pictures."""
        if isinstance(loop, BaseLoop):  # built before
            return loop
        loop = dict(loop)
        if 'type' not in loop:
            by_epoch = loop.pop('by_epoch')
            loop['type'] = 'EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop'
        # A class, its name, or that with a scope before it.
        kind = getattr(loop['type'], '__name__', loop['type']).rpartition('.')[2]
        if kind in RESUMABLE:
            loop['type'] = RESUMABLE[kind]
            self._train_dataloader = resumable(self._train_dataloader)
        built = super().build_train_loop(loop)
        if is_main_process():
            check_pictures(built.dataloader.dataset)
        return built

    def load_or_resume(self) -> None:
        """Load what the config says, or go on from the newest complete checkpoint.

        With ``resume='auto'``, and with ``resume=True`` without ``load_from``, from the
        newest in the work dir; if there is none, ``load_from`` is loaded.
        """
        if self._resume == 'auto' or (self._resume and self._load_from is None):
            trust = self.cfg.get('trust', False)
            found: list[Path | None] = [None]
            if is_main_process():
                found = [newest_checkpoint(self.work_dir, trust)]
            broadcast_object_list(found)
            self._resume = found[0] is not None
            if self._resume:
                self._load_from = str(found[0])
                self.logger.info(f'Going on from {self._load_from}.')
            else:
                weights = f' from {self._load_from}' if self._load_from else ''
                self.logger.info(
                    f'No checkpoint in {self.work_dir}: training starts anew{weights}.'
                )
        super().load_or_resume()

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Go on from a checkpoint."""
        self._goes_on = True
        try:
            super().resume(filename, *args, **kwargs)
        finally:
            self._goes_on = False

    def load_checkpoint(
        self, filename: str, map_location: Any = 'cpu', **_: Any
    ) -> dict:
        """Load the weights of a checkpoint, return all that it holds.

        Args:
            filename (str): File or URL.
            map_location: It is read to the CPU in any case.

        Raises:
            OSError: If there is no such file.
            ValueError: If it can't be read safely, belongs to another model or, when
                resuming, has no state of a training.
        """
        # trust is for what a training goes on from, not for weights.
        trust = self._goes_on and self.cfg.get('trust', False)
        checkpoint = read_checkpoint(filename, trust)
        if self._goes_on:
            check_resumable(filename, checkpoint)
        checkpoint['state_dict'] = weights_of(filename, checkpoint)
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        model = self.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        partial = self.cfg.get('allow_partial', False)
        load_weights(model, filename, checkpoint['state_dict'], partial)
        self._has_loaded = True
        self.logger.info(f'Load checkpoint from {filename}')
        return checkpoint


class CPURunner(StrictRunner):
    """A Runner for several processes on the CPU, where mmengine's wants GPUs.

    The processes talk through gloo. SyncBN, which torch has for GPUs only, becomes
    BN, with the statistics of each process alone.
    """

    def setup_env(self, env_cfg: dict) -> None:
        """Join the processes before mmengine would, on GPUs."""
        torch.distributed.init_process_group('gloo')
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model as mmengine does by default, but for the device."""
        self.logger.warning('No GPU: SyncBN becomes BN, within each process.')
        return MMDistributedDataParallel(
            revert_sync_batchnorm(model),
            broadcast_buffers=False,
            find_unused_parameters=self.cfg.get('find_unused_parameters', False),
        )
