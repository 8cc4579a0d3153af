"""The tables of sizes, against the published figures."""

import csv
import sys

import pytest
from conftest import REPOSITORY

for _framework in ('mmseg', 'mmdet', 'mmpretrain'):
    pytest.importorskip(_framework)


def test_published_sizes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / 'tools')
    import compare_backbones

    command = [
        'compare_backbones.py',
        '--out',
        str(tmp_path),
        '--only',
        'Swin-T',
        'PVT-S',
    ]
    monkeypatch.setattr(sys, 'argv', command)
    compare_backbones.main()
    with (tmp_path / 'backbones.csv').open() as file:
        rows = list(csv.DictReader(file))
    # Of the paper: parameters in M, FLOPs in G. Those of PVT are without attention.
    expected = [
        ('Table 3: UperNet, 512x2048', 'Swin-T', 59.9, 945, True),
        ('Table 4(a): Mask R-CNN, 800x1280', 'PVT-S', 44, 245, False),
        ('Table 4(a): Mask R-CNN, 800x1280', 'Swin-T', 48, 264, True),
    ]
    assert [(row['table'], row['backbone']) for row in rows] == [
        e[:2] for e in expected
    ]
    markdown = (tmp_path / 'backbones.md').read_text()
    for row, (_, name, params, flops, attention) in zip(rows, expected, strict=True):
        assert float(row['params (M), published']) == params
        assert float(row['params (M), here']) == pytest.approx(params, rel=0.01)
        assert float(row['FLOPs (G), published']) == flops
        here = float(row['FLOPs (G), here'])
        here -= 0 if attention else float(row['of which attention'])
        assert here == pytest.approx(flops, rel=0.015)
        assert f'| {name} | {" | ".join(list(row.values())[2:])} |' in markdown
    assert (tmp_path / 'backbones.png').read_bytes().startswith(b'\x89PNG')
