"""Reading weights as plain data, which runs no code; torch alone."""

import zipfile
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

NAMED = 3  # keys that a message names


def read_plain_data(file: str, path: str | None = None, trust: bool = False) -> dict:
    """Read a file of torch or safetensors to the CPU.

    Args:
        file (str): What messages name.
        path (str, optional): Where it lies, if that is elsewhere.
        trust (bool): Whether to unpickle whatever it holds, which may run any code.

    Returns:
        dict: What it holds.

    Raises:
        OSError: If there is no such file.
        ImportError: If safetensors is needed and not there.
        ValueError: If it is damaged, no checkpoint, or more than plain data.
    """
    path = str(path or file)
    address = str(file).partition('?')[0]  # a download lies under another name
    try:
        if any(name.endswith('.safetensors') for name in (path, address)):
            from safetensors.torch import load_file

            return load_file(path)
        _check_sums(path)
        loaded = torch.load(path, 'cpu', weights_only=not trust)
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # of what kind depends on where the reading stopped
        cause = str(error).rpartition('WeightsUnpickler error: ')[2].strip()
        cause = (cause or repr(error)).splitlines()[0].split('. ')[0]
        raise ValueError(
            f'{file} is damaged, is no checkpoint or holds more than plain data:'
            f' {cause}. Copy it again; or, if you trust it, keep its weights alone:'
            f' torch.save(torch.load({str(file)!r}, weights_only=False)["state_dict"],'
            f' ...). To resume a training from it, tools/train.py has --trust'
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(_no_checkpoint(file, loaded))
    return loaded


def weights_of(file: str, checkpoint: dict) -> dict[str, Tensor]:
    """The weights of a checkpoint that was read; ``file`` is named in errors."""
    wrapper = next((key for key in ('state_dict', 'model') if key in checkpoint), None)
    weights = checkpoint[wrapper] if wrapper else checkpoint
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(value, Tensor) for value in weights.values())
    ):
        raise ValueError(_no_checkpoint(file, checkpoint))
    return weights


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those tensors that hold a NaN or an infinity."""
    return [key for key, x in tensors.items() if not x.isfinite().all()]


def some(keys: Collection[str]) -> str:
    """The number of keys and the first of them."""
    if not keys:
        return 'none'
    more = ', ...' if len(keys) > NAMED else ''
    return f'{len(keys)} ({", ".join(list(map(str, keys))[:NAMED])}{more})'


def _check_sums(file: str) -> None:
    """Raise a ValueError if a checksum is wrong; torch stores them, but reads past."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
        if bad:
            raise ValueError(f'the checksum of {bad} is wrong')


def _no_checkpoint(file: str, loaded: object) -> str:
    got = some(loaded) if isinstance(loaded, dict) else type(loaded).__name__
    return (
        f'{file} is no checkpoint: expected tensors by their names, bare or under'
        f" 'state_dict' or 'model', got {got}"
    )
