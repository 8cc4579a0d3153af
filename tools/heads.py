"""Heads that take what a backbone gives."""

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope


def fit_heads(cfg: Config) -> None:
    """Tell what follows the backbone of a config how many channels come from it.

    Raises:
        ValueError: If nothing in its model has ``in_channels``.
    """
    init_default_scope(cfg.default_scope)
    probe = MODELS.build(cfg.model.backbone).to('meta')
    probe.eval()  # returns nothing in some backbones
    with torch.no_grad():
        features = probe(torch.empty(1, 3, 224, 224, device='meta'))
    channels = [feature.shape[1] for feature in features]
    model = cfg.model
    parts = ('neck', 'panoptic_head', 'decode_head', 'head')
    first = next(
        (model[p] for p in parts if 'in_channels' in (model.get(p) or {})), None
    )
    if first is None:
        raise ValueError(f'expected in_channels in one of {", ".join(parts)} of model')
    last_alone = isinstance(first.in_channels, int)
    first.in_channels = channels[-1] if last_alone else channels
    if model.get('auxiliary_head'):
        model.auxiliary_head.in_channels = channels[model.auxiliary_head.in_index]
