"""The Runner of the command-line tools, with and without GPUs."""

import logging
import os
import sys

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import barrier, get_backend, is_distributed
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.runner import Runner
from torch import nn


def build_runner(cfg: Config) -> Runner:
    """Build the Runner that a config describes.

    Args:
        cfg (Config): Its ``launcher`` says how the processes were started. Those of
            torchrun need no GPU: without one they run on the CPU.
    """
    on_cpu = cfg.launcher == 'pytorch' and get_device() == 'cpu'
    return (CPURunner if on_cpu else Runner).from_cfg(cfg)


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


class CPURunner(Runner):
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
