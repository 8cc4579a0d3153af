"""What training adds to mmengine."""

from .checkpointing import AtomicCheckpointHook, Interrupted
from .flops import register_flop_counters
from .hooks import (
    CentroidHook,
    GroupVisualizationHook,
    LabelCheckHook,
    LossCheckHook,
    PlainCheckpointHook,
    group_usage,
)
from .label_maps import CheckLabelMap
from .optim import BFloat16OptimWrapper, LayerDecayOptimWrapperConstructor
from .sharded import FullStateFSDPStrategy

register_flop_counters()

__all__ = [
    'AtomicCheckpointHook',
    'BFloat16OptimWrapper',
    'CentroidHook',
    'CheckLabelMap',
    'FullStateFSDPStrategy',
    'GroupVisualizationHook',
    'Interrupted',
    'LabelCheckHook',
    'LayerDecayOptimWrapperConstructor',
    'LossCheckHook',
    'PlainCheckpointHook',
    'group_usage',
]
