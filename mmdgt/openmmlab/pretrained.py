"""Weights from a checkpoint: all of them, or an error that says why not."""

import os
import re
from collections.abc import Collection

from mmengine.logging import print_log
from mmengine.model import PretrainedInit, update_init_info
from torch import nn

from ..models.blocks import refuse_old_weights
from ..weights import some
from .checkpoints import misfits, read_weights

OUTPUT_NORM, STAGE = r'norm\d+\.', r'stages\.\d+\.'


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
        there, own = read_weights(file), module.state_dict()
        prefix = f'{self.prefix.rstrip(".")}.' if self.prefix else ''
        weights = {
            key.removeprefix(prefix): value
            for key, value in there.items()
            if key.startswith(prefix)
        }
        refuse_old_weights(weights)
        if not weights.keys() & own.keys():
            raise ValueError(_wrong_prefix(file, prefix, there, next(iter(own))))
        problems = misfits(own, weights)
        if bad := problems.pop('not finite'):
            raise ValueError(
                f'{file} has tensors with NaN or infinity: {some(bad)}. Its training'
                f' went wrong: take an earlier checkpoint'
            )
        new = _of_absent_parts(problems['missing'], weights, OUTPUT_NORM)
        unused = _of_absent_parts(problems['unexpected'], own, f'{OUTPUT_NORM}|{STAGE}')
        problems['missing'] = [k for k in problems['missing'] if k not in new]
        problems['unexpected'] = [k for k in problems['unexpected'] if k not in unused]
        if any(problems.values()):
            raise ValueError(_misfit(file, problems))
        module.load_state_dict(weights, strict=False)
        print_log(
            f'{type(module).__name__}: loaded {len(weights) - len(unused)} tensors of'
            f' {file}; not in it and left as initialised: {some(new)}; in it and not'
            f' used: {some(unused)}',
            logger='current',
        )
        update_init_info(module, init_info=f'Loaded from {file}')


def _of_absent_parts(
    keys: Collection[str], others: Collection[str], part: str
) -> list[str]:
    """Those keys of the parts (a pattern) from which there is none in the others."""
    present = {found[0] for key in others if (found := re.match(part, key))}
    return [k for k in keys if (found := re.match(part, k)) and found[0] not in present]


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
    kinds = '; '.join(f'{kind}: {some(keys)}' for kind, keys in problems.items())
    return (
        f'{file} holds the weights of another backbone, {kinds}. Probably'
        f' its {cause} differs: set it as in pre-training'
    )
