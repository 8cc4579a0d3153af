"""What mmengine leaves open of optimizers: mixed precision, layer-wise rates."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
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


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Lower learning rates in the backbone, for the models of all frameworks.

    Of N layers, layer i has ``layer_decay_rate ** (N - 1 - i)`` times the learning
    rate that it had without (BEiT, Bao et al., ICLR 2022), the last layer and the heads
    all of it. What is a layer, the backbone's ``get_layer_depth`` says. The rate of the
    whole backbone is multiplied by ``backbone_lr_mult``. ``paramwise_cfg`` takes both,
    1 by default, beside all that mmengine's own constructor takes; there, a part with
    ``lr_mult`` in ``custom_keys`` loses the settings of its norms.

    mmsegmentation's and mmdetection's constructors know ConvNeXt, BEiT and MAE alone,
    mmpretrain's needs a model that is a classifier and takes no ``lr_mult``.
    """

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs: Any
    ) -> None:
        """Add a group for every parameter of a module.

        Args:
            params (list[dict]): The groups, added to in place.
            module (nn.Module): The model; of its parts, when called for these.
            prefix (str): Name of the part, empty for the model.
            **kwargs: As mmengine has them.
        """
        super().add_params(params, module, prefix, **kwargs)
        if prefix:
            return
        decay = self.paramwise_cfg.get('layer_decay_rate', 1.0)
        factor = self.paramwise_cfg.get('backbone_lr_mult', 1.0)
        backbone: Any = module.backbone
        names = {parameter: name for name, parameter in module.named_parameters()}
        for group in params:
            name = names[group['params'][0]]
            layer, num_layers = backbone.get_layer_depth(name, 'backbone.')
            scale = decay ** (num_layers - 1 - layer)
            if name.startswith('backbone.'):
                scale *= factor
            group['lr'] = group.get('lr', self.base_lr) * scale
