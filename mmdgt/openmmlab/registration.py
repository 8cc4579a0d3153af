"""Where the backbone is registered."""

import importlib
import importlib.util
import warnings

from ..frameworks import FRAMEWORKS


def register_backbone(backbone: type) -> None:
    """Register a backbone in the ``MODELS`` of every framework that is installed.

    Each registry gets an entry of its own, so that ``type='DGT'`` resolves in any
    scope. A framework that is installed but does not import is warned of and left
    out, so that it costs nobody the use of the others.

    Args:
        backbone (type): The class; registered under its own name.
    """
    for framework in FRAMEWORKS:
        if importlib.util.find_spec(framework) is None:
            continue
        try:
            registry = importlib.import_module(f'{framework}.registry').MODELS
        # The frameworks assert the versions of what they need.
        except (ImportError, AssertionError) as error:
            warnings.warn(
                f'{backbone.__name__} is not registered in {framework}, which is'
                f' installed but does not import: {error}',
                stacklevel=3,
            )
            continue
        if backbone.__name__ not in registry.module_dict:
            registry.register_module(module=backbone)
