"""The one way in for checkpoints: nothing is run, nothing is left out silently."""

import logging
from collections.abc import Mapping
from pathlib import Path

from mmengine.fileio import get_local_path
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from ..files import PART
from ..models.blocks import refuse_old_weights
from ..weights import not_finite, read_plain_data, some, weights_of

# Of a checkpoint that training can go on from, beside its weights.
STATES = ('meta', 'message_hub', 'optimizer')


def read_checkpoint(file: str, trust: bool = False) -> dict:
    """Read a checkpoint of plain data, to the CPU.

    Args:
        file (str): File or URL.
        trust (bool): Whether to unpickle whatever it holds, which may run any code.

    Returns:
        dict: What it holds.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is damaged, no checkpoint, or more than plain data.
    """
    try:
        with get_local_path(str(file)) as path:
            return read_plain_data(file, path, trust)
    except OSError as error:
        raise OSError(
            f'a checkpoint must name a file or URL that can be read, got {file}:'
            f' {error}'
        ) from error


def read_weights(file: str) -> dict[str, Tensor]:
    """Read the weights alone, bare or under ``state_dict`` or ``model``.

    Args:
        file (str): File or URL.

    Returns:
        dict: Every tensor by its name.

    Raises:
        OSError, ValueError: As :func:`read_checkpoint`, or if it has no weights.
    """
    return weights_of(file, read_checkpoint(file))


def load_weights(
    model: nn.Module,
    file: str,
    weights: Mapping[str, Tensor],
    allow_partial: bool = False,
) -> None:
    """Load weights into a model: all of them, and all of its.

    Args:
        model (nn.Module): What they belong to.
        file (str): Where they are from, for messages.
        weights (Mapping[str, Tensor]): By their names.
        allow_partial (bool): Whether to warn of what does not fit and load the rest.

    Raises:
        ValueError: If a tensor is missing, unexpected, of another shape or not
            finite; nothing is loaded then.
    """
    refuse_old_weights(weights)
    problems = misfits(model.state_dict(), weights)
    named = '; '.join(f'{kind}: {some(keys)}' for kind, keys in problems.items())
    bad = {key.split()[0] for keys in problems.values() for key in keys}
    if bad and not allow_partial:
        raise ValueError(
            f'{file} does not hold the weights of the model that the config describes,'
            f' all of them and finite; {named}. Take the checkpoint that was trained'
            f' with this config; the tools load what fits of another by --allow-partial'
        )
    fitting = {key: value for key, value in weights.items() if key not in bad}
    if bad:
        print_log(
            f'{file}: only {len(fitting)} tensors are loaded; {named}',
            logger='current',
            level=logging.WARNING,
        )
    model.load_state_dict(fitting, strict=False)


def misfits(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """What keeps weights from a model, by the kind of it.

    Args:
        own (Mapping[str, Tensor]): The state dict of the model.
        weights (Mapping[str, Tensor]): Those to load.
    """
    return {
        'missing': [key for key in own if key not in weights],
        'unexpected': [key for key in weights if key not in own],
        'of another shape': [
            f'{key} {tuple(weights[key].shape)} there, {tuple(x.shape)} here'
            for key, x in own.items()
            if key in weights and weights[key].shape != x.shape
        ],
        'not finite': not_finite(weights),
    }


def check_resumable(file: str, checkpoint: dict) -> None:
    """Raise a ValueError if a checkpoint has weights, but no state of a training."""
    missing = [key for key in STATES if key not in checkpoint]
    if missing:
        raise ValueError(
            f'{file} has no {", ".join(missing)}, so no training can go on from it;'
            f' to start a new one from its weights, run tools/train.py without'
            f' --resume and with --cfg-options load_from={file}'
        )


def newest_checkpoint(folder: str | Path, trust: bool = False) -> Path | None:
    """The checkpoint that was written last of those that training can go on from.

    Args:
        folder (str | Path): With ``*.pth``, and perhaps ``last_checkpoint``, which
            names another folder.
        trust (bool): As for :func:`read_checkpoint`.

    Returns:
        Path: None if there is no checkpoint at all.

    Raises:
        ValueError: If there are some, none of which will do.
    """
    folders, last = {Path(folder)}, Path(folder, 'last_checkpoint')
    if last.is_file():
        named = Path(last.read_text().strip())
        # In the copy of a work dir it names the original, which trains on elsewhere.
        if not Path(folder, named.name).is_file():
            folders.add(named.parent)
    files = {file.resolve() for place in folders for file in place.glob('*.pth')}
    files = {file for file in files if not file.name.startswith(PART)}
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        try:
            check_resumable(str(file), read_checkpoint(str(file), trust))
        except ValueError as error:
            print_log(f'Passed over: {error}', logger='current', level=logging.WARNING)
            continue
        return file
    if files:
        raise ValueError(
            f'expected a checkpoint in {folder} to go on from, but none of its'
            f' {len(files)} will do; the log says why. Move them away to start anew'
        )
    return None


def load_from_plain_data(file: str, map_location: str | None = None) -> dict:
    """A loader for mmengine, whose own unpickles all that it cannot read safely."""
    return read_checkpoint(file)


def secure_framework() -> None:
    """Let all of OpenMMLab read checkpoints by :func:`read_checkpoint` from now on."""
    CheckpointLoader.register_scheme(
        ['', 'http://', 'https://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://'],
        load_from_plain_data,
        force=True,
    )
