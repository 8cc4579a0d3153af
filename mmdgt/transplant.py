"""A warm start from a relative: weights of a Swin Transformer V2 in a DGT.

DGT-S and DGT-B share with Swin V2-S and -B (Liu et al., CVPR 2022) the widths, the
heads, the depths but for two blocks, cosine attention and norms behind the branches. So
these can be taken, by name and shape:

- of the attention, the projections and logit scales. Swin V2 has no bias for the keys,
  which is zero here; its position bias has no counterpart, for DGT has its CPE;
- the norms of the blocks;
- of the feed-forward network, both linear layers, which are 1x1 convolutions here;
- patch merging: four pixels in a linear layer are a 3x3 convolution of stride 2 whose
  first row and column are zero.

Stem, first patch merging, CPE, the depth-wise convolutions and batch norms of the IRFFN
and the centroids stay as they are. Needs torch alone::

    python -m mmdgt.transplant SOURCE OUT --arch small
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .commands import run_command
from .files import whole_file
from .models import DGT
from .weights import NAMED, not_finite, read_plain_data, weights_of


class Layout(NamedTuple):
    """Where a library keeps the parts of a Swin V2.

    Attributes:
        stages: Name of the stages.
        attention, expand, reduce: Names in a block of the attention and of the linear
            layers of the feed-forward network.
        merged: What the columns of a patch merging are, the slowest first: channel c,
            row h and column w of the pixel.
    """

    stages: str
    attention: str
    expand: str
    reduce: str
    merged: str

    def sources(self, name: str) -> list[str]:
        """Names of the tensors that one of a DGT is made of; none if it has none."""
        if found := re.fullmatch(r'stages\.(\d+)\.blocks\.(\d+)\.(.+)', name):
            stage, block, part = found.groups()
            parts = self._block().get(part, ())
            return [f'{self.stages}.{stage}.blocks.{block}.{part}' for part in parts]
        found = re.fullmatch(r'stages\.([1-9]\d*)\.merge\.(.+)', name)
        if found and found[2] in MERGING:
            return [f'{self.stages}.{found[1]}.downsample.{MERGING[found[2]]}']
        return []

    def _block(self) -> dict[str, tuple[str, ...]]:
        """Of every part of a block, what it is made of."""
        renamed = {
            'attention.qkv.weight': f'{self.attention}.qkv.weight',
            'attention.logit_scale': f'{self.attention}.logit_scale',
        }
        for ours, theirs in {
            'attention.proj': f'{self.attention}.proj',
            'norm1': 'norm1',
            'norm2': 'norm2',
            'irffn.expand': self.expand,
            'irffn.reduce': self.reduce,
        }.items():
            for kind in ('weight', 'bias'):
                renamed[f'{ours}.{kind}'] = f'{theirs}.{kind}'
        biases = f'{self.attention}.q_bias', f'{self.attention}.v_bias'
        return {
            'attention.qkv.bias': biases,
            **{ours: (theirs,) for ours, theirs in renamed.items()},
        }

    def convert(self, name: str, *tensors: Tensor) -> Tensor:
        """Make a tensor of a DGT from those of its sources."""
        if name.endswith('.attention.qkv.bias'):
            query, value = tensors
            return torch.cat([query, torch.zeros_like(query), value])
        (tensor,) = tensors
        if name.endswith(('.irffn.expand.weight', '.irffn.reduce.weight')):
            return tensor[:, :, None, None]
        if name.endswith('.merge.0.bias'):
            return tensor.new_zeros(len(tensor))
        if name.endswith('.merge.0.weight'):
            sizes = [
                2 if axis in 'hw' else tensor.shape[1] // 4 for axis in self.merged
            ]
            order = [1 + self.merged.index(axis) for axis in 'chw']
            kernel = tensor.unflatten(1, sizes).permute(0, *order)
            return F.pad(kernel, (1, 0, 1, 0))
        return tensor


MERGING = {
    '0.weight': 'reduction.weight',
    '0.bias': 'reduction.weight',
    '1.weight': 'norm.weight',
    '1.bias': 'norm.bias',
}
TIMM = Layout('layers', 'attn', 'mlp.fc1', 'mlp.fc2', 'whc')
MMPRETRAIN = Layout('stages', 'attn.w_msa', 'ffn.layers.0.0', 'ffn.layers.1', 'chw')


class Report(NamedTuple):
    """What became of the tensors of a Swin V2 and of a DGT.

    Attributes:
        taken: Names in the DGT, each with those in the source.
        skipped: Names in the source that have no place in the DGT.
        left: Names in the DGT that stay as they were, random in a new one.
    """

    taken: dict[str, list[str]]
    skipped: list[str]
    left: list[str]

    def __str__(self) -> str:
        """A line for each kind of tensor, with stages and blocks as numbers."""
        lines = []
        for what, names in self._asdict().items():
            kinds: dict[str, int] = {}
            for name in names:
                kind = re.sub(r'(stages|layers|blocks)\.\d+\.', r'\1.*.', name)
                kinds[kind] = kinds.get(kind, 0) + 1
            lines.append(f'{what}: {len(names)} tensors')
            lines += [f'{number:6}  {kind}' for kind, number in kinds.items()]
        return '\n'.join(lines)


@torch.no_grad()
def transplant(
    model: nn.Module, weights: Mapping[str, Tensor], strict: bool = False
) -> Report:
    """Give a DGT what it can take of a Swin V2.

    Args:
        model (nn.Module): A :class:`mmdgt.DGT` with ``post_norm``, such as DGT-S and
            DGT-B, OpenMMLab's or timm's.
        weights (Mapping[str, Tensor]): The state dict of a Swin V2 of timm, of
            Microsoft or of mmpretrain, with any prefix.
        strict (bool): Whether every tensor that could come from a Swin V2 has to.

    Returns:
        Report: What was taken, skipped and left.

    Raises:
        ValueError: If the weights are none of a Swin V2, nothing fits or, with
            ``strict``, something does not; the model stays as it was then.
    """
    layout, weights = _understand(weights)
    own = model.state_dict()
    if 'stages.0.blocks.0.attention.logit_scale' not in own:
        raise ValueError(
            'a Swin V2 has cosine attention, and norms behind its branches, but this'
            " model has not: take arch='small' or 'base', or a dict with"
            ' post_norm=True'
        )
    taken, new, misfits = {}, {}, []
    for name, tensor in own.items():
        sources = layout.sources(name)
        if not sources:
            continue
        if not weights.keys() >= set(sources):
            misfits.append(f'{name} (not there)')
            continue
        found = layout.convert(name, *(weights[source] for source in sources))
        if found.shape == tensor.shape:
            taken[name], new[name] = sources, found
        else:
            there, here = tuple(found.shape), tuple(tensor.shape)
            misfits.append(f'{name} ({there} there, {here} here)')
    if not taken or (strict and misfits):
        named = ', '.join(misfits[:NAMED]) + ', ...' * (len(misfits) > NAMED)
        raise ValueError(
            f'{len(misfits)} tensors of the DGT are not in this Swin V2, or of another'
            f' shape there: {named}. DGT-S takes all of its from Swin V2-S, DGT-B from'
            f' Swin V2-B'
        )
    for name, tensor in new.items():
        own[name].copy_(tensor)
    used = {source for sources in taken.values() for source in sources}
    return Report(
        taken,
        skipped=[name for name in weights if name not in used],
        left=[name for name in own if name not in taken],
    )


def _understand(weights: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
    """The layout of the weights of a Swin V2, and these without their prefix."""
    for layout in (TIMM, MMPRETRAIN):
        mark = f'{layout.stages}.0.blocks.0.{layout.attention}.logit_scale'
        for key in weights:
            prefix = key.removesuffix(mark)
            if prefix == key or (prefix and prefix[-1] != '.'):
                continue
            plain = {key.removeprefix(prefix): x for key, x in weights.items()}
            return layout, _merging_first(plain)
    raise ValueError(
        "these are not the weights of a Swin Transformer V2 in timm's, Microsoft's or"
        f" mmpretrain's layout: none ends in {mark!r} or the like. They start with"
        f' {", ".join(list(weights)[:NAMED])}'
    )


def _merging_first(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Number the patch mergings by the stage behind them.

    Microsoft's checkpoints number them by the stage before.
    """
    if 'layers.0.downsample.reduction.weight' not in weights:
        return weights
    return {
        re.sub(
            r'^layers\.(\d+)\.downsample',
            lambda found: f'layers.{int(found[1]) + 1}.downsample',
            key,
        ): tensor
        for key, tensor in weights.items()
    }


def read_weights(file: str) -> dict[str, Tensor]:
    """Read the weights of a checkpoint as plain data, which runs no code.

    Args:
        file (str): With the weights bare or under ``state_dict`` or ``model``, or of
            safetensors.

    Raises:
        OSError: If there is no such file.
        ValueError: If it can't be read safely, or a weight is not finite.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f'expected a checkpoint, but there is no file {file}')
    weights = weights_of(file, read_plain_data(file))
    if bad := not_finite(weights):
        raise ValueError(f'{file}: {bad[0]} holds a NaN or an infinity')
    return weights


def main() -> None:
    """Read a Swin V2, write a backbone and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', help='checkpoint of a Swin Transformer V2')
    parser.add_argument('out', type=Path, help='checkpoint to write')
    parser.add_argument(
        '--arch', required=True, choices=('small', 'base'), help='size of the DGT'
    )
    parser.add_argument('--num-groups', type=int, default=48, help='its groups G')
    parser.add_argument('--seed', type=int, default=0, help='of what stays random')
    parser.add_argument(
        '--strict',
        action='store_true',
        help='write nothing unless all that could come from a Swin V2 does',
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = DGT(args.arch, num_groups=args.num_groups, out_norm=False)
    report = transplant(model, read_weights(args.source), args.strict)
    state = {f'backbone.{key}': x for key, x in model.state_dict().items()}
    meta = dict(source=args.source, seed=args.seed, **report._asdict())
    with whole_file(args.out) as part:
        torch.save(dict(state_dict=state, meta=dict(transplant=meta)), part)
    sizes = {name: x.numel() for name, x in model.named_parameters()}
    share = sum(sizes[name] for name in report.taken) / sum(sizes.values())
    print(f'{report}\n{share:.1%} of the parameters are taken; written to {args.out}')


if __name__ == '__main__':
    run_command(main)
