"""Mixed precision that mmengine leaves open."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from torch import nn


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Runs the forward pass in bfloat16 autocast, on the CPU or a GPU.

    mmengine's ``AmpOptimWrapper`` is for GPUs only. bfloat16 has the range of
    float32, so the loss needs no scaling.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The context of the forward pass."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield
