"""What instance segmentation needs beyond mmdetection, which this imports."""

from .rpn_head import FloatRPNHead
from .tta import InstanceTTAModel

__all__ = ['FloatRPNHead', 'InstanceTTAModel']
