"""What training adds to mmengine."""

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
    'BFloat16OptimWrapper',
    'CentroidHook',
    'GroupVisualizationHook',
    'LabelCheckHook',
    'LayerDecayOptimWrapperConstructor',
    'PlainCheckpointHook',
    'group_usage',
]
