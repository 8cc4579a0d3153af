"""What training adds to mmengine."""

from .flops import register_flop_counters
from .hooks import CentroidHook, LabelCheckHook, PlainCheckpointHook, group_usage

register_flop_counters()

__all__ = ['CentroidHook', 'LabelCheckHook', 'PlainCheckpointHook', 'group_usage']
