"""Dynamic Group Transformer (DGT) for OpenMMLab.

Importing the package registers the backbone ``DGT`` with every framework of
OpenMMLab that is installed, and its hooks with mmengine. In a config:
``custom_imports = dict(imports=['mmdgt'])``.
"""

from .engine import CentroidHook, PlainCheckpointHook
from .models import DGT, update_centroids
from .registry import register_backbone
from .version import __version__

register_backbone(DGT)

__all__ = [
    'DGT',
    'CentroidHook',
    'PlainCheckpointHook',
    '__version__',
    'update_centroids',
]
