"""DGT as OpenMMLab builds it: from config dicts."""

import re
from functools import partial
from typing import Any

from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import nn

from .. import models
from ..models.mixers import TOKEN_MIXERS
from .pretrained import strict_init


class DGT(models.DGT, BaseModule):
    """The backbone in the registries of mmpretrain, mmdet and mmsegmentation.

    Takes what :class:`mmdgt.DGT` takes and returns what it returns, but for:

    Args:
        norm_cfg (dict): Normalisation over feature maps, in stem and IRFFN, in place
            of ``norm_layer``.
        token_mixer (str | type | dict): As in :class:`mmdgt.DGT`, or by the name of a
            class in the registry ``MODELS``.
        init_cfg (dict | list[dict], optional): Initialisation, in mmengine's terms.
            ``dict(type='Pretrained', checkpoint=FILE, prefix='backbone.')`` loads the
            backbone of any model, and raises where the weights do not fit; a
            checkpoint of None is as if it were not there.
    """

    def __init__(
        self,
        *args: Any,
        norm_cfg: dict = dict(type='BN'),
        token_mixer: str | type | dict = 'group',
        init_cfg: dict | list[dict] | None = None,
        **kwargs: Any,
    ) -> None:
        settings: dict[str, Any] = dict(
            norm_layer=partial(_build_norm, norm_cfg),
            drop_path_layer=DropPath,
            token_mixer=_find_class(token_mixer),
            **kwargs,
        )
        super().__init__(*args, **settings)
        self.init_cfg = strict_init(init_cfg)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Place of a parameter among the layers, for layer-wise learning rates.

        As for Swin in mmpretrain: the stem is the first layer, every block is one, and
        output norms and all outside of the backbone are the last. A patch merging
        belongs to the block behind it.

        Args:
            param_name (str): Name of the parameter.
            prefix (str): What precedes the names of the backbone's.

        Returns:
            tuple[int, int]: Its layer, from 0, and the number of layers.
        """
        stages: Any = self.stages
        depths = [len(stage.blocks) for stage in stages]
        num_layers = sum(depths) + 2
        if param_name.startswith(f'{prefix}stem.'):
            return 0, num_layers
        pattern = re.escape(prefix) + r'stages\.(\d+)\.(?:blocks\.(\d+))?'
        place = re.match(pattern, param_name)
        if not place:
            return num_layers - 1, num_layers
        stage, block = (int(number or 0) for number in place.groups())
        return sum(depths[:stage]) + block + 1, num_layers


def _build_norm(norm_cfg: dict, dims: int) -> nn.Module:
    return build_norm_layer(norm_cfg, dims)[1]


def _find_class(token_mixer: Any) -> Any:
    """The class that a registered name stands for, anything else as it is."""
    if isinstance(token_mixer, dict):
        return dict(token_mixer, type=_find_class(token_mixer.get('type')))
    if isinstance(token_mixer, str) and token_mixer not in TOKEN_MIXERS:
        return MODELS.get(token_mixer) or token_mixer
    return token_mixer
