"""Rebuild the sizes in the paper's tables 3 and 4(a), and time the models.

    python tools/compare_backbones.py
    python tools/compare_backbones.py --time
    python tools/compare_backbones.py --time DGT-T Swin-T

Every backbone that the frameworks and timm have is put into our UperNet and Mask R-CNN
and counted; the published figures stand beside. Writes backbones.md, .csv and .png.

--time adds to backbones.json how long a forward pass takes and its peak memory. What
is in that file already is not measured again, so an interrupted run goes on where it
stopped, and the tables show it from then on.
"""

import argparse
import csv
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from heads import fit_heads
from measure import (
    add_out,
    find_out,
    in_fresh_process,
    machine,
    output_folder,
    peak_bytes,
    save,
    seconds,
    summary,
)
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement
from torch import nn

import mmdgt  # noqa: F401
from mmdgt.commands import run_command
from mmdgt.files import whole_file
from mmdgt.openmmlab.engine.flops import count_flops

CONFIGS = Path(__file__).parents[1] / 'configs'
COLUMNS = (
    'backbone',
    'params (M), published',
    'params (M), here',
    'FLOPs (G), published',
    'FLOPs (G), here',
    'of which attention',
    'time (ms)',
    'peak memory (MiB)',
)
# Products of matrices that depend on the image: in these models, attention.
ATTENTION = ('aten.bmm', 'aten.baddbmm', 'mmdgt.')


class Row(NamedTuple):
    """A backbone in the order of the columns; None for what nobody gives."""

    name: str
    params: float | None
    params_here: float
    flops: float | None
    flops_here: float
    attention: float
    milliseconds: float | None = None
    mebibytes: int | None = None


class Table(NamedTuple):
    """A table of the paper, and the model that the backbones are put into.

    ``classes`` are those of the paper: backbones of about one size, which are timed
    in turns. Each has the published parameters (M) and FLOPs (G) by the backbone's
    name, or None.
    """

    title: str
    config: str
    size: tuple[int, int]
    classes: tuple[dict[str, tuple[float, float] | None], ...]


def of_mmpretrain(kind: str, **settings: Any) -> dict:
    """A backbone that returns the features of all stages."""
    return dict(type=f'mmpretrain.{kind}', out_indices=(0, 1, 2, 3), **settings)


def of_timm(name: str, **settings: Any) -> dict:
    """A backbone of timm that returns the features of all stages."""
    return dict(
        type='mmpretrain.TIMMBackbone', model_name=name, features_only=True, **settings
    )


def pvt(*num_layers: int) -> dict:
    """A PVT of so many layers a stage."""
    return dict(type='mmdet.PyramidVisionTransformer', num_layers=num_layers)


BACKBONES = {
    **{
        f'DGT-{size}': dict(type='DGT', arch=size, num_keys=392)
        for size in ('T', 'S', 'B')
    },
    **{
        f'Swin-{size}': of_mmpretrain('SwinTransformer', arch=size.lower())
        for size in ('T', 'S', 'B')
    },
    **{
        f'{kind}-{size[0].upper()}': of_mmpretrain(
            kind, arch=size, gap_before_final_norm=False
        )
        for kind in ('ConvNeXt', 'HorNet')
        for size in ('tiny', 'small', 'base')
    },
    **{
        f'DaViT-{size}': of_mmpretrain('DaViT', arch=size.lower())
        for size in ('T', 'S', 'B')
    },
    **{
        # The first of its five maps is the stem's.
        f'MaxViT-{size[0].upper()}': of_timm(
            f'maxvit_{size}_tf_224', out_indices=(1, 2, 3, 4)
        )
        for size in ('tiny', 'small', 'base')
    },
    **{
        f'GC-ViT-{size[0].upper()}': of_timm(f'gcvit_{size}')
        for size in ('tiny', 'small', 'base')
    },
    **{
        f'{name}-{size[0].upper()}': of_mmpretrain(kind, arch=size)
        for name, kind in (('TwinsP', 'PCPVT'), ('Twins', 'SVT'))
        for size in ('small', 'base', 'large')
    },
    'PVT-S': pvt(3, 4, 6, 3),
    'PVT-M': pvt(3, 4, 18, 3),
    'PVT-L': pvt(3, 8, 27, 3),
    'Res50': of_mmpretrain('ResNet', depth=50),
    'Res101': of_mmpretrain('ResNet', depth=101),
    'X101-32': of_mmpretrain('ResNeXt', depth=101, groups=32, width_per_group=4),
    'X101-64': of_mmpretrain('ResNeXt', depth=101, groups=64, width_per_group=4),
}
# What the paper does not list has the figures of its own authors, where they give any
# (NOTES names the sources).
TABLES = (
    Table(
        'Table 3: UperNet, 512x2048',
        'upernet_dgt_t_ade20k.py',
        (512, 2048),
        (
            {
                'TwinsP-S': (54.6, 919),
                'Twins-S': (54.4, 901),
                'Swin-T': (59.9, 945),
                'ConvNeXt-T': (60, 939),
                'DaViT-T': (60, 940),
                'HorNet-T': (52, 926),
                'MaxViT-T': None,
                'GC-ViT-T': None,
                'DGT-T': (52.5, 954),
            },
            {
                'Res101': (86.0, 1029),
                'TwinsP-B': (74.3, 977),
                'Twins-B': (88.5, 1020),
                'Swin-S': (81.3, 1038),
                'ConvNeXt-S': (82, 1027),
                'DaViT-S': (81, 1030),
                'HorNet-S': (81, 1030),
                'MaxViT-S': None,
                'GC-ViT-S': None,
                'DGT-S': (81.9, 1074),
            },
            {
                'TwinsP-L': (91.5, 1041),
                'Twins-L': (133.0, 1164),
                'Swin-B': (121.0, 1188),
                'ConvNeXt-B': (122, 1170),
                'DaViT-B': (121, 1175),
                'HorNet-B': (121, 1174),
                'MaxViT-B': None,
                'GC-ViT-B': None,
                'DGT-B': (122.2, 1234),
            },
        ),
    ),
    Table(
        'Table 4(a): Mask R-CNN, 800x1280',
        'mask_rcnn_dgt_t_1x_coco.py',
        (800, 1280),
        (
            {
                'Res50': (44, 260),
                'PVT-S': (44, 245),
                'TwinsP-S': (44, 245),
                'Twins-S': (44, 228),
                'Swin-T': (48, 264),
                'ConvNeXt-T': (48, 262),
                'DaViT-T': (47.8, 263),
                'HorNet-T': None,
                'MaxViT-T': None,
                'GC-ViT-T': (48, 291),
                'DGT-T': (42, 272),
            },
            {
                'Res101': (63, 336),
                'X101-32': (63, 340),
                'PVT-M': (64, 302),
                'TwinsP-B': (64, 302),
                'Twins-B': (76, 340),
                'Swin-S': (69, 354),
                'ConvNeXt-S': None,
                'DaViT-S': (69.2, 351),
                'HorNet-S': None,
                'MaxViT-S': None,
                'GC-ViT-S': None,
                'DGT-S': (70, 386),
            },
            {
                'X101-64': (101, 493),
                'PVT-L': (81, 364),
                'TwinsP-L': (81, 364),
                'Twins-L': (111, 474),
                'Swin-B': (107, 496),
                'ConvNeXt-B': None,
                'DaViT-B': (107.3, 491),
                'HorNet-B': None,
                'MaxViT-B': None,
                'GC-ViT-B': None,
                'DGT-B': (108, 540),
            },
        ),
    ),
)
NOTES = """
- Published: the paper's figures; those of ConvNeXt, DaViT, HorNet and GC-ViT, which it
  does not list, from the README files of their authors' repositories
  (facebookresearch/ConvNeXt, dingmyu/davit, raoyongming/HorNet, NVlabs/GCVit; HorNet's
  variants of 7x7 convolutions).
- The published FLOPs of PVT and Twins are those without attention, its products of
  matrices. The published parameters of Twins include a classifier of 1000 classes,
  which their code keeps in the backbone.
- Twins-L in Mask R-CNN: 111 is the count of its RetinaNet. Table 8 of the Twins paper
  has 110.9 for RetinaNet and 119.7 for Mask R-CNN, and 101.9 for X101-64.
- MaxViT and GC-ViT are timm's, whose windows grow with the image: their sides are 1/32
  of the image's in pixels (1/16 in GC-ViT's third stage). In the code of GC-ViT's
  authors for detection, whose figure is the published one, all windows are 24x24.
- Left out: VOLO, TNT and ConViT, whose features in timm 1.0.31 have one stride alone
  (16), no pyramid of four; CrossFormer, ViL, CSWin and CMT, which none of mmpretrain,
  mmdet, mmsegmentation and timm implements.
"""
TIMED = """\
- Time, where a row has one: median of {passes} forward passes of the whole model in
  evaluation mode, one image, float32, random weights, on {device};
  backbones of a size took turns. Mask R-CNN runs as it is counted, by mode='tensor':
  proposals get a box, the best 100 of them a mask, and nothing is pasted into the
  picture. Memory: weights and what a pass adds at its peak. `backbones.json` has the
  number of passes, quartiles and versions.
"""


def build(table: Table, backbone: dict) -> nn.Module:
    """The table's model on a backbone, in evaluation mode."""
    cfg = Config.fromfile(CONFIGS / table.config)
    init_default_scope(cfg.default_scope)
    MMLogger.get_current_instance().setLevel('ERROR')  # tells of scopes and of timm
    cfg.model.backbone = backbone
    fit_heads(cfg)
    if needs_timm(backbone):  # those here make their windows for one size
        cfg.model.backbone = backbone | dict(img_size=table.size)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.eval()
    return model


def needs_timm(backbone: dict) -> bool:
    """Whether timm builds it."""
    return backbone['type'] == 'mmpretrain.TIMMBackbone'


def count(table: Table, name: str, published: tuple[float, float] | None) -> Row:
    """Count one of the backbones."""
    model = build(table, BACKBONES[name]).to('meta')
    params = sum(p.numel() for p in model.parameters()) / 1e6
    flops = count_flops(model, *table.size)
    attention = (n for operator, n in flops.items() if operator.startswith(ATTENTION))
    known: tuple[float | None, float | None] = published or (None, None)
    return Row(
        name,
        known[0],
        round(params, 1),
        known[1],
        round(sum(flops.values()) / 1e9),
        round(sum(attention) / 1e9),
    )


class Measurements:
    """Times and memory by table and backbone, kept in a file.

    Args:
        file (Path): The JSON, which need not exist yet.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.about, self.rows = {}, {}
        if file.exists():
            content = json.loads(file.read_text())
            self.about = content['machine']
            self.rows = {(r['table'], r['backbone']): r for r in content['results']}

    def go_on(self, about: dict) -> None:
        """Take measurements of this machine.

        Raises:
            ValueError: Those in the file are of another one or other versions.
        """
        # What may change is in every row.
        self.state = {
            key: about.pop(key) for key in ('commit', 'clean') if key in about
        }
        if self.rows and self.about != about:
            raise ValueError(
                f'{self.file} was measured on {self.about}, this is {about}: move it'
                ' away to start anew, or choose another folder by --out'
            )
        self.about = about

    def add(self, title: str, name: str, **measured: Any) -> None:
        """Put into a row, and write the file."""
        row = dict(table=title, backbone=name, **self.state, **measured)
        self.rows[title, name] = row
        save(self.file, self.about, results=list(self.rows.values()))

    def rounds(self, title: str, name: str) -> int:
        """How often a backbone was timed."""
        return self.rows.get((title, name), {'rounds': 0})['rounds']

    def complete(self, title: str, row: Row) -> Row:
        """The row with its time and memory, if measured."""
        if not self.rounds(title, row.name):
            return row
        measured = self.rows[title, row.name]
        memory = round(measured['peak_bytes'] / 2**20)
        return row._replace(milliseconds=round(measured['ms']), mebibytes=memory)


def prepare(table: Table, backbone: dict, device: str) -> tuple[nn.Module, Callable]:
    """A model, and the function that runs it once."""
    torch.manual_seed(0)
    model = build(table, backbone).to(device)
    image = torch.randn(1, 3, *table.size, device=device)
    samples = [BaseDataElement(metainfo=dict(img_shape=table.size))]

    @torch.no_grad()
    def forward() -> None:
        model(image, samples, mode='tensor')

    return model, forward


def peak_of(table: Table, backbone: dict, device: str) -> int:
    """The bytes that a model takes at its peak, in a process of its own."""
    return peak_bytes(*prepare(table, backbone, device), device)


def measure(
    table: Table, names: list[str], device: str, rounds: int, kept: Measurements
) -> None:
    """Time backbones of about one size in turns; all of them are in memory then."""
    calls, peaks = {}, {}
    for name in names:
        peaks[name] = in_fresh_process(peak_of, table, BACKBONES[name], device)
        _, calls[name] = prepare(table, BACKBONES[name], device)
        calls[name]()
        print(f'{table.title}  {name}  {peaks[name] / 2**20:.0f} MiB', flush=True)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
            print(f'{table.title}  {name}  {times[name][-1]:.2f} s', flush=True)
            measured = summary(sorted(times[name]), 'ms', 1e3)
            kept.add(table.title, name, peak_bytes=peaks[name], **measured)


def write_markdown(
    file: Path, results: dict[str, list[Row]], kept: Measurements
) -> None:
    """Both tables and their notes."""
    with whole_file(file) as part, part.open('w') as out:
        out.write('# Backbones, published, counted and timed\n\n')
        out.write('Written by `python tools/compare_backbones.py`. One multiply-add')
        out.write(' counts once.\n\n![FLOPs and times by backbone](backbones.png)\n')
        for title, rows in results.items():
            out.write(f'\n## {title}\n\n| {" | ".join(COLUMNS)} |\n')
            out.write(f'|{" --- |" * len(COLUMNS)}\n')
            out.writelines(f'| {" | ".join(cells(row))} |\n' for row in rows)
        out.write(f'\n## Notes\n{NOTES}')
        if about := kept.about:
            device = about.get('gpu') or f'{about["cpu"]}, {about["threads"]} threads'
            rounds = sorted({row['rounds'] for row in kept.rows.values()})
            passes = ' to '.join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))
            out.write(TIMED.format(device=device, passes=passes))


def cells(row: Row) -> Iterable[str]:
    """The row as text, a dash for what nobody gives."""
    return ('-' if cell is None else str(cell) for cell in row)


def write_csv(file: Path, results: dict[str, list[Row]]) -> None:
    """Both tables in one, the first column naming the table."""
    with whole_file(file) as part, part.open('w', newline='') as out:
        writer = csv.writer(out, lineterminator='\n')
        writer.writerow(['table', *COLUMNS])
        for title, rows in results.items():
            writer.writerows([title, *cells(row)] for row in rows)


def family(row: Row) -> str:
    """A backbone's name less its size."""
    return re.sub(r'-[^-]+$|\d+$', '', row.name)


def plot(file: Path, results: dict[str, list[Row]]) -> None:
    """FLOPs as bars, what is published as rings; below, where timed, time by FLOPs."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot, ticker

    timed = any(row.milliseconds for rows in results.values() for row in rows)
    figure, axes = pyplot.subplots(
        1 + timed,
        len(results),
        figsize=(11, 13 if timed else 7.5),
        height_ratios=[7, 5][: 1 + timed],
        squeeze=False,
        layout='constrained',
    )
    for ax, (title, rows) in zip(axes[0], results.items(), strict=True):
        names = [row.name for row in rows]
        attention = [row.attention for row in rows]
        rest = [row.flops_here - row.attention for row in rows]
        published = [row.flops or float('nan') for row in rows]
        ax.barh(names, rest, color='C0', label='counted')
        ax.barh(names, attention, left=rest, color='C1', label='of which attention')
        ax.plot(published, names, 'o', mfc='none', mec='k', label='published')
        ax.invert_yaxis()
        ax.set(title=title, xlabel='FLOPs (G)')
        for label in ax.get_yticklabels():
            label.set_weight('bold' if label.get_text().startswith('DGT') else 'normal')
    ax.legend()
    every = itertools.chain(*results.values())
    families = list(dict.fromkeys(family(row) for row in every if row.milliseconds))
    for ax, rows in zip(axes[1:].flat, results.values(), strict=timed):
        for index, name in enumerate(families):
            members = [
                (row.flops_here, row.milliseconds / 1e3)
                for row in rows
                if row.milliseconds and family(row) == name
            ]
            if not members:
                continue
            ax.plot(
                *zip(*members, strict=True),
                marker='osv^<>DXP*ph'[index % 12],
                label=name,
                color='k' if name == 'DGT' else f'C{index}',
                linewidth=3 if name == 'DGT' else 1,
            )
        ax.set_yscale('log')
        ax.yaxis.set_major_locator(
            ticker.LogLocator(subs=(1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9))
        )
        ax.yaxis.set_major_formatter('{x:g}')
        ax.minorticks_off()
        ax.set(xlabel='FLOPs (G)', ylabel='time (s)')
        ax.legend(fontsize='small')
    with whole_file(file) as part:
        figure.savefig(part, dpi=80)


def main() -> None:
    """Count, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known: dict[str, Any] = dict(choices=BACKBONES, metavar='BACKBONE')
    add_out(parser, Path('docs/backbones'), 'folder', output_folder)
    parser.add_argument(
        '--only', nargs='+', default=BACKBONES, help='what the tables have', **known
    )
    parser.add_argument(
        '--time', nargs='*', help='measure these, or all if none is named', **known
    )
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu'
    )
    parser.add_argument('--rounds', type=int, default=3, help='times each is timed')
    args = parser.parse_args()
    out = find_out(parser, args)
    names = list(args.only)
    if importlib.util.find_spec('timm') is None:
        names = [name for name in names if not needs_timm(BACKBONES[name])]
        left_out = ', '.join(name for name in args.only if name not in names)
        if left_out:
            print(f'left out for want of timm ("pip install timm"): {left_out}')
    kept = Measurements(out / 'backbones.json')

    counted: dict[str, list[Row]] = {table.title: [] for table in TABLES}
    for table in TABLES:
        for name, published in itertools.chain(*(c.items() for c in table.classes)):
            if name in names:
                row = count(table, name, published)
                counted[table.title].append(row)
                print(table.title, *cells(row), sep='  ', flush=True)
    write(out, counted, kept)
    if args.time is None:
        return
    kept.go_on(machine(args.device))
    wanted = set(args.time or names).intersection(names)
    for table in TABLES:
        for members in table.classes:
            missing = [
                name
                for name in members
                if name in wanted and kept.rounds(table.title, name) < args.rounds
            ]
            if missing:
                measure(table, missing, args.device, args.rounds, kept)
                write(out, counted, kept)


def write(folder: Path, counted: dict[str, list[Row]], kept: Measurements) -> None:
    """All three files, with what is measured so far."""
    results = {
        title: [kept.complete(title, row) for row in rows]
        for title, rows in counted.items()
    }
    write_markdown(folder / 'backbones.md', results, kept)
    write_csv(folder / 'backbones.csv', results)
    plot(folder / 'backbones.png', results)


if __name__ == '__main__':
    run_command(main)
