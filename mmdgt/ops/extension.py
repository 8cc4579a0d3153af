"""The compiled extension: whether it loads, and what its kernels take."""

import importlib
import re
import warnings

import torch

HOW_TO_BUILD = (
    'build it with "pip install --no-build-isolation --no-deps --force-reinstall ."'
    " in mmdgt's folder"
)


def load() -> tuple[dict, str | None]:
    """Register the compiled kernels.

    An extension that loads but was built for another torch is used, with a warning.

    Returns:
        tuple: The limits of the kernels as the extension states them, empty where it
        does not load; what is wrong, None if nothing is.
    """
    try:
        extension = importlib.import_module('mmdgt._ext')
    except ModuleNotFoundError:
        return {}, 'the extension mmdgt._ext is not built'
    except ImportError as error:
        limits: dict = {}
        problem = (
            'the extension mmdgt._ext does not load, most likely because it was built'
            f' for another torch than {torch.__version__} ({error})'
        )
    else:
        limits = getattr(extension, 'limits', {})
        if extension.torch_version != _release(torch.__version__):
            problem = (
                'the extension mmdgt._ext was built for torch'
                f' {extension.torch_version}, this is {torch.__version__}'
            )
        elif not limits:
            problem = 'the extension mmdgt._ext was built from an older mmdgt'
        else:
            return limits, None
    warnings.warn(f'{problem}; {HOW_TO_BUILD}', stacklevel=3)
    return limits, problem


def _release(version: str) -> str:
    """'2.11.0' of '2.11.0a0+ecf3bae.nv26.01', which is all that torch's headers say."""
    return '.'.join(re.findall(r'\d+', version)[:3])


def devices(operator: str = 'group_attention') -> list[str]:
    """The types of device that the loaded extension has kernels of an operator for."""
    return [
        key.lower()
        for key in ('CPU', 'CUDA')
        if torch._C._dispatch_has_kernel_for_dispatch_key(f'mmdgt::{operator}', key)
    ]
