"""Rebuild the sizes in the paper's tables 3 and 4(a).

Every backbone that the frameworks have is put into our UperNet and Mask R-CNN and
counted; the published figures stand beside. Writes backbones.md, .csv and .png.
"""

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import mmpretrain.models  # noqa: F401  # registers its backbones
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import mmdgt  # noqa: F401
from mmdgt.engine.flops import count_flops

CONFIGS = Path(__file__).parents[1] / 'configs'
COLUMNS = (
    'backbone',
    'params (M), published',
    'params (M), here',
    'FLOPs (G), published',
    'FLOPs (G), here',
    'of which attention',
)
# Products of matrices that depend on the image: in these models, attention.
ATTENTION = ('aten.bmm', 'aten.baddbmm', 'mmdgt.')


class Row(NamedTuple):
    """A backbone in the order of the columns; None for what is not published."""

    name: str
    params: float | None
    params_here: float
    flops: float | None
    flops_here: float
    attention: float


class Table(NamedTuple):
    """A table of the paper, and the model that the backbones are put into.

    ``published`` has the parameters (M) and the FLOPs (G) by the backbone's name;
    None for what the paper does not list.
    """

    title: str
    config: str
    size: tuple[int, int]
    published: dict[str, tuple[float, float] | None]


def of_mmpretrain(kind: str, **settings) -> dict:
    """A backbone that returns the features of all stages."""
    return dict(type=f'mmpretrain.{kind}', out_indices=(0, 1, 2, 3), **settings)


def pvt(*num_layers: int) -> dict:
    """A PVT of so many layers a stage."""
    return dict(type='mmdet.PyramidVisionTransformer', num_layers=num_layers)


# CrossFormer and ViL, which the tables list too, are in none of the frameworks.
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
        f'ConvNeXt-{size[0].upper()}': of_mmpretrain(
            'ConvNeXt', arch=size, gap_before_final_norm=False
        )
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
TABLES = (
    Table(
        'Table 3: UperNet, 512x2048',
        'upernet_dgt_t_ade20k.py',
        (512, 2048),
        {
            'TwinsP-S': (54.6, 919),
            'Twins-S': (54.4, 901),
            'Swin-T': (59.9, 945),
            'ConvNeXt-T': None,
            'DGT-T': (52.5, 954),
            'Res101': (86.0, 1029),
            'TwinsP-B': (74.3, 977),
            'Twins-B': (88.5, 1020),
            'Swin-S': (81.3, 1038),
            'ConvNeXt-S': None,
            'DGT-S': (81.9, 1074),
            'TwinsP-L': (91.5, 1041),
            'Twins-L': (133.0, 1164),
            'Swin-B': (121.0, 1188),
            'ConvNeXt-B': None,
            'DGT-B': (122.2, 1234),
        },
    ),
    Table(
        'Table 4(a): Mask R-CNN, 800x1280',
        'mask_rcnn_dgt_t_1x_coco.py',
        (800, 1280),
        {
            'Res50': (44, 260),
            'PVT-S': (44, 245),
            'TwinsP-S': (44, 245),
            'Twins-S': (44, 228),
            'Swin-T': (48, 264),
            'ConvNeXt-T': None,
            'DGT-T': (42, 272),
            'Res101': (63, 336),
            'X101-32': (63, 340),
            'PVT-M': (64, 302),
            'TwinsP-B': (64, 302),
            'Twins-B': (76, 340),
            'Swin-S': (69, 354),
            'ConvNeXt-S': None,
            'DGT-S': (70, 386),
            'X101-64': (101, 493),
            'PVT-L': (81, 364),
            'TwinsP-L': (81, 364),
            'Twins-L': (111, 474),
            'Swin-B': (107, 496),
            'ConvNeXt-B': None,
            'DGT-B': (108, 540),
        },
    ),
)


def build(table: Table, backbone: dict) -> nn.Module:
    """The table's model on a backbone, without memory for its weights."""
    cfg = Config.fromfile(CONFIGS / table.config)
    init_default_scope(cfg.default_scope)
    probe = MODELS.build(backbone).to('meta')
    probe.eval()  # returns nothing in some backbones
    with torch.no_grad():
        features = probe(torch.empty(1, 3, 224, 224, device='meta'))
    channels = [feature.shape[1] for feature in features]
    cfg.model.backbone = backbone
    if cfg.default_scope == 'mmseg':
        cfg.model.decode_head.in_channels = channels
        cfg.model.auxiliary_head.in_channels = channels[2]
    else:
        cfg.model.neck.in_channels = channels
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).to('meta')
    model.eval()
    return model


def count(table: Table, name: str) -> Row:
    """Count one of the backbones."""
    model = build(table, BACKBONES[name])
    params = sum(p.numel() for p in model.parameters()) / 1e6
    flops = count_flops(model, *table.size)
    attention = (n for operator, n in flops.items() if operator.startswith(ATTENTION))
    published = table.published[name] or (None, None)
    return Row(
        name,
        published[0],
        round(params, 1),
        published[1],
        round(sum(flops.values()) / 1e9),
        round(sum(attention) / 1e9),
    )


def write_markdown(file: Path, results: dict[str, list[Row]]) -> None:
    """Both tables."""
    with file.open('w') as out:
        out.write('# Sizes of backbones, published and counted\n\n')
        out.write('Written by `python tools/compare_backbones.py`. One multiply-add')
        out.write(
            ' counts once. The\npublished FLOPs of PVT and Twins are those without'
        )
        out.write(' attention, its products of matrices.\n\n![](backbones.png)\n')
        for title, rows in results.items():
            out.write(f'\n## {title}\n\n| {" | ".join(COLUMNS)} |\n')
            out.write(f'|{" --- |" * len(COLUMNS)}\n')
            out.writelines(f'| {" | ".join(cells(row))} |\n' for row in rows)


def cells(row: Row) -> Iterable[str]:
    """The row as text, a dash where nothing is published."""
    return ('-' if cell is None else str(cell) for cell in row)


def write_csv(file: Path, results: dict[str, list[Row]]) -> None:
    """Both tables in one, the first column naming the table."""
    with file.open('w', newline='') as out:
        writer = csv.writer(out, lineterminator='\n')
        writer.writerow(['table', *COLUMNS])
        for title, rows in results.items():
            writer.writerows([title, *cells(row)] for row in rows)


def plot(file: Path, results: dict[str, list[Row]]) -> None:
    """The FLOPs as bars, what is published as rings."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(11, 5.5), squeeze=False)
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
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default='docs/backbones', help='folder')
    parser.add_argument(
        '--only', nargs='+', choices=BACKBONES, default=BACKBONES, metavar='BACKBONE'
    )
    args = parser.parse_args()
    results = {}
    for table in TABLES:
        rows = results[table.title] = []
        for name in (name for name in table.published if name in args.only):
            rows.append(count(table, name))
            print(table.title, *cells(rows[-1]), sep='  ', flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    write_markdown(args.out / 'backbones.md', results)
    write_csv(args.out / 'backbones.csv', results)
    plot(args.out / 'backbones.png', results)


if __name__ == '__main__':
    main()
