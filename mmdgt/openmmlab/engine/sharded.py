"""Training in shares, by PyTorch's FSDP, with checkpoints of the whole model."""

from typing import Any

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.device import get_device
from mmengine.registry import STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel


@STRATEGIES.register_module()
class FullStateFSDPStrategy(FSDPStrategy):
    """mmengine's FSDP, whose checkpoints are those of a model in one piece.

    They evaluate anywhere, and with ``AtomicCheckpointHook`` a training goes on from
    them to the bit, where mmengine's strategy fails or goes on with other moments. For
    mmengine's ``FlexibleRunner``.

    Args:
        **kwargs: As for mmengine's ``FSDPStrategy``, but for ``state_dict_cfg``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, state_dict_cfg='full')
        # On the CPU torch would free, as a copy of a device's, what it reads then.
        offload = get_device() != 'cpu'
        for config in (self.state_dict_config, self.optim_state_dict_config):
            config.offload_to_cpu = offload

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        """Wrap it with weights in one order: torch mixes up channels-last moments."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.data.contiguous()
        return super()._wrap_model(model)

    def load_model_state_dict(self, state_dict: dict, **_: Any) -> None:
        """Load the weights of the whole model, all of them."""
        self.model.load_state_dict(state_dict, strict=True)

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the state of an optimizer of the whole model."""
        # By name: mmengine has the order of an older torch.
        state = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model,
            optim=self.optim_wrapper.optimizer,
            optim_state_dict=state_dict,
        )
        self.optim_wrapper.load_state_dict(state)
