"""Weights from a checkpoint: all of them, or an error that says why not."""

import os
import re
from collections.abc import Collection

import torch
from mmengine.fileio import get_local_path
from mmengine.logging import print_log
from mmengine.model import PretrainedInit, update_init_info
from torch import Tensor, nn

from ..models.blocks import refuse_old_weights

OUTPUT_NORM, STAGE = r'norm\d+\.', r'stages\.\d+\.'
NAMED = 3  # keys that a message names


def strict_init(init_cfg: dict | list[dict] | None) -> list[dict]:
    """Put the strict loading where an ``init_cfg`` has mmengine's.

    Args:
        init_cfg (dict | list[dict], optional): Initialisation, in mmengine's terms.

    Returns:
        list[dict]: The same with :class:`StrictPretrainedInit`, which comes last.
    """
    configs = [init_cfg] if isinstance(init_cfg, dict) else init_cfg or []
    others, pretrained = [], []
    for cfg in configs:
        if cfg['type'] in ('Pretrained', PretrainedInit):
            pretrained.append(dict(cfg, type=StrictPretrainedInit))
        else:
            others.append(cfg)
    return [*others, *pretrained]


class StrictPretrainedInit(PretrainedInit):
    """Initialisation of a DGT from a checkpoint, in place of mmengine's.

    mmengine's loads what fits and only prints what does not. Here all has to fit but
    the norms of outputs that one of the two does not have, and stages of the
    checkpoint behind the last that the backbone builds.

    Args:
        checkpoint (str, optional): File or URL of a checkpoint, its weights bare or
            under ``state_dict`` or ``model``. None leaves the module as it is.
        prefix (str, optional): What precedes the backbone's keys, such as
            'backbone.'.
        map_location (str): Device to read the checkpoint to.
    """

    def __call__(self, module: nn.Module) -> None:
        """Load the weights into the module.

        Raises:
            OSError: If there is no such file.
            ValueError: If torch can't read it safely, or if the weights are not
                those of this module.
        """
        if self.checkpoint is None:
            return
        file = os.path.expanduser(self.checkpoint)
        there, own = read_weights(file, self.map_location), module.state_dict()
        prefix = f'{self.prefix.rstrip(".")}.' if self.prefix else ''
        weights = {
            key.removeprefix(prefix): value
            for key, value in there.items()
            if key.startswith(prefix)
        }
        refuse_old_weights(weights)
        if not weights.keys() & own.keys():
            raise ValueError(_wrong_prefix(file, prefix, there, next(iter(own))))
        missing = [key for key in own if key not in weights]
        unexpected = [key for key in weights if key not in own]
        new = _of_absent_parts(missing, weights, OUTPUT_NORM)
        unused = _of_absent_parts(unexpected, own, f'{OUTPUT_NORM}|{STAGE}')
        problems = {
            'missing': [key for key in missing if key not in new],
            'unexpected': [key for key in unexpected if key not in unused],
            'of another shape': [
                f'{key} {tuple(weights[key].shape)} there, {tuple(x.shape)} here'
                for key, x in own.items()
                if key in weights and weights[key].shape != x.shape
            ],
        }
        if any(problems.values()):
            raise ValueError(_misfit(file, problems))
        module.load_state_dict(weights, strict=False)
        print_log(
            f'{type(module).__name__}: loaded {len(weights) - len(unused)} tensors of'
            f' {file}; not in it and left as initialised: {_some(new)}; in it and not'
            f' used: {_some(unused)}',
            logger='current',
        )
        update_init_info(module, init_info=f'Loaded from {file}')


def read_weights(file: str, map_location: str) -> dict[str, Tensor]:
    """Read the weights of a checkpoint with ``weights_only=True``.

    Args:
        file (str): File or URL.
        map_location (str): Device.

    Returns:
        dict: Every tensor by its name.

    Raises:
        OSError: If there is no such file.
        ValueError: If torch can't read it safely, or if it is no checkpoint.
    """
    try:
        with get_local_path(file) as path:
            loaded = torch.load(path, map_location, weights_only=True)
    except OSError as error:
        raise OSError(
            f'init_cfg.checkpoint must name a file or URL that can be read, got {file}:'
            f' {error}. None starts from random weights'
        ) from error
    except Exception as error:  # of what kind depends on where the reading stopped
        cause = str(error).rpartition('WeightsUnpickler error: ')[2].strip()
        cause = (cause or repr(error)).splitlines()[0].split('. ')[0]
        raise ValueError(
            f'{file} is damaged, is no checkpoint or holds more than plain data:'
            f' {cause}. Copy it again; or, if you trust it, keep its weights alone:'
            f' torch.save(torch.load({file!r}, weights_only=False)["state_dict"], ...)'
        ) from error
    weights = loaded
    for wrapper in ('state_dict', 'model'):
        if isinstance(loaded, dict) and wrapper in loaded:
            weights = loaded[wrapper]
            break
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(value, Tensor) for value in weights.values())
    ):
        got = _some(loaded) if isinstance(loaded, dict) else type(loaded).__name__
        raise ValueError(
            f'{file} is no checkpoint: expected tensors by their names, bare or under'
            f" 'state_dict' or 'model', got {got}"
        )
    return weights


def _of_absent_parts(
    keys: Collection[str], others: Collection[str], part: str
) -> list[str]:
    """Those keys of the parts (a pattern) from which there is none in the others."""
    present = {found[0] for key in others if (found := re.match(part, key))}
    return [k for k in keys if (found := re.match(part, k)) and found[0] not in present]


def _some(keys: Collection[str]) -> str:
    """The number of keys and the first of them."""
    if not keys:
        return 'none'
    more = ', ...' if len(keys) > NAMED else ''
    return f'{len(keys)} ({", ".join(list(map(str, keys))[:NAMED])}{more})'


def _wrong_prefix(file: str, prefix: str, keys: Collection[str], one: str) -> str:
    """The message, with the prefix that the key ``one`` has in the checkpoint."""
    starts = sorted({f'{key.split(".")[0]}.' for key in keys})
    fitting = [key.removesuffix(one) for key in keys if key.endswith(one)]
    advice = 'Set' if fitting else 'None fits a DGT: set init_cfg.checkpoint, or'
    return (
        f'none of the {len(keys)} keys of {file} is one of the backbone behind'
        f' init_cfg.prefix {prefix!r}; they start with {", ".join(map(repr, starts))}.'
        f' {advice} init_cfg.prefix{" to " + repr(fitting[0]) if fitting else ""}'
    )


def _misfit(file: str, problems: dict[str, list[str]]) -> str:
    named = [key for kind in problems.values() for key in kind]
    centroids_alone = all(key.split()[0].endswith('.centroids') for key in named)
    cause = 'num_groups' if centroids_alone else 'arch, in_channels or norm_cfg'
    kinds = '; '.join(f'{kind}: {_some(keys)}' for kind, keys in problems.items())
    return (
        f'{file} holds the weights of another backbone, {kinds}. Probably'
        f' its {cause} differs: set it as in pre-training'
    )
