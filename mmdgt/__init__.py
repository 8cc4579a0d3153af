"""Dynamic Group Transformer (DGT) for OpenMMLab.

Importing the package registers the backbone ``DGT`` with every framework of
OpenMMLab that is installed, and its hooks with mmengine. In a config:
``custom_imports = dict(imports=['mmdgt'])``.

The operators, ``mmdgt.ops``, need torch alone: where OpenMMLab does not import,
a warning says so, and what needs it raises.
"""

import warnings
from typing import NoReturn

from .version import __version__

__all__ = [
    'DGT',
    'CentroidHook',
    'PlainCheckpointHook',
    '__version__',
    'update_centroids',
]

_problem = None
try:
    from .engine import CentroidHook, PlainCheckpointHook
    from .models import DGT, update_centroids
    from .registry import register_backbone

    register_backbone(DGT)
except Exception as error:  # a broken installation raises whatever it likes
    _problem = error
    warnings.warn(
        f'mmdgt is not usable with OpenMMLab here: {type(error).__name__}: {error}.'
        ' "python -m mmdgt.doctor" names the cure',
        stacklevel=2,
    )


def __getattr__(name: str) -> NoReturn:
    if name in __all__:
        raise ImportError(
            f'mmdgt.{name} is not there because OpenMMLab does not import:'
            f' {_problem}. "python -m mmdgt.doctor" names the cure'
        ) from _problem
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
