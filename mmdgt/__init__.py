"""Dynamic Group Transformer (DGT).

The network, ``mmdgt.DGT``, and the operators, ``mmdgt.ops``, need torch and numpy
alone. Importing the package registers the backbone with the frameworks of OpenMMLab
and its hooks with mmengine (``mmdgt.openmmlab``), and the classifiers with timm
(``mmdgt.timm``), where these are installed. In a config:
``custom_imports = dict(imports=['mmdgt'])``.
"""

import importlib
import importlib.util
import warnings
from typing import NoReturn

from .configs import config_path
from .version import __version__

__all__ = [
    'DGT',
    'DynamicGroupAttention',
    '__version__',
    'config_path',
    'update_centroids',
]


def _register_with(name: str, *needs: str) -> None:
    """Import what registers DGT with others, if they are installed."""
    if any(importlib.util.find_spec(need) is None for need in needs):
        return
    try:
        importlib.import_module(f'{__name__}.{name}')
    except Exception as error:  # a broken installation raises whatever it likes
        _warn(f'DGT is not registered with {name}, which does not import', error)


def _warn(what: str, error: Exception) -> None:
    warnings.warn(
        f'{what}: {type(error).__name__}: {error}. "python -m mmdgt.doctor" says what'
        ' to do',
        stacklevel=4,
    )


_problem: Exception | None = None
try:
    from .models import DGT, DynamicGroupAttention, update_centroids
except Exception as error:  # the doctor has to run where torch does not
    _problem = error
    _warn('mmdgt is not usable here', error)
else:
    _register_with('openmmlab', 'mmengine', 'mmcv')
    _register_with('timm', 'timm')


def __getattr__(name: str) -> NoReturn:
    if name in __all__:
        raise ImportError(
            f'mmdgt.{name} is not there, for it does not import: {_problem}. "python -m'
            ' mmdgt.doctor" says what to do'
        ) from _problem
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
