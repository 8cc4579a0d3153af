"""What training adds to mmengine."""

from .checkpointing import AtomicCheckpointHook, Interrupted
from .flops import register_flop_counters
from .hooks import (
    CentroidHook,
    GroupVisualizationHook,
    LabelCheckHook,
    PlainCheckpointHook,
    group_usage,
)
from .optim import BFloat16OptimWrapper, LayerDecayOptimWrapperConstructor

register_flop_counters()

__all__ = [
    'AtomicCheckpointHook',
    'BFloat16OptimWrapper',
    'CentroidHook',
    'GroupVisualizationHook',
    'Interrupted',
    'LabelCheckHook',
    'LayerDecayOptimWrapperConstructor',
    'PlainCheckpointHook',
    'group_usage',
]
