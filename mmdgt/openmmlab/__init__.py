"""DGT in OpenMMLab: the registered backbone, hooks, and what the tools run on.

Importing this registers the backbone ``DGT`` with every framework that is installed
and the hooks with mmengine.
"""

from .backbone import DGT
from .distillation import FeatureDistiller
from .engine import CentroidHook, PlainCheckpointHook
from .registration import register_backbone

register_backbone(DGT)

__all__ = ['DGT', 'CentroidHook', 'FeatureDistiller', 'PlainCheckpointHook']
