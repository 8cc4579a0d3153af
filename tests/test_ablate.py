"""The command for ablations, on a tiny network and a few pictures."""

import json
import statistics

import pytest
from conftest import REPOSITORY, TINY_ARCH, TINY_HEADS

pytest.importorskip('mmpretrain')

CONFIG = """
_base_ = '{repository}/configs/dgt_ablation_demo.py'
model = dict(
    backbone=dict(arch={arch}),
    {head}
)
train_dataloader = dict(batch_size=4, dataset=dict(pipeline={pipeline}))
val_dataloader = dict(dataset=dict(pipeline={pipeline}))
"""
PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=32),
    dict(type='PackInputs'),
]


@pytest.fixture
def ablate(demo_data, tmp_path, call_tool):
    config = tmp_path / 'tiny.py'
    config.write_text(
        CONFIG.format(
            repository=REPOSITORY,
            arch=TINY_ARCH,
            head=TINY_HEADS['dgt_t_demo'],
            pipeline=PIPELINE,
        )
    )

    def run(*variants):
        call_tool(
            'ablate',
            *(config, '--variants', *variants, '--seeds', 0, 1, '--iterations', 2),
            *('--work-dir', tmp_path / 'runs', '--out', tmp_path / 'out'),
            *('--cfg-options', f'data_root={demo_data}/imagenet'),
        )
        return json.loads((tmp_path / 'out/ablations.json').read_text())['results']

    return run


def test_ablation(ablate, tmp_path, capsys):
    variants = 'mirrored', 'shifted_window'
    rows = ablate(*variants)
    assert [row['variant'] for row in rows] == list(variants)
    # Of the paper's tables 1 and 4(c).
    assert rows[0]['dgt_t'] == dict(
        params=24.09, flops=pytest.approx(4.35, rel=0.015), published=None
    )
    assert rows[1]['dgt_t']['published'] == 82.8
    markdown = (tmp_path / 'out/ablations.md').read_text()
    for row in rows:
        top1 = [run['top1'] for run in row['runs']]
        assert [run['seed'] for run in row['runs']] == [0, 1]
        assert row['mean'] == pytest.approx(statistics.mean(top1), abs=0.01)
        assert row['spread'] == pytest.approx(abs(top1[0] - top1[1]) / 2**0.5, abs=0.01)
        assert f'{row["mean"]} | {row["spread"]} | {top1[0]}, {top1[1]} |' in markdown
    assert (tmp_path / 'out/ablations.png').read_bytes().startswith(b'\x89PNG')
    # What differs has reached the runs.
    dumped = {v: (tmp_path / f'runs/{v}/seed_1/tiny.py').read_text() for v in variants}
    for variant, said in (
        ('mirrored', 'mirrored=True'),
        ('shifted_window', 'window_size=4'),
    ):
        assert [v for v in variants if said in dumped[v]] == [variant]
    assert all('seed=1' in text and 'max_iters=2' in text for text in dumped.values())

    # A second call trains nothing but what has another config.
    file = tmp_path / 'runs/mirrored/seed_0/result.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(config='other')))
    capsys.readouterr()
    assert ablate(*variants)[1] == rows[1]
    states = [
        line.rsplit(', ', 1)[1]
        for line in capsys.readouterr().out.splitlines()
        if 'top-1' in line
    ]
    assert states == ['trained', *3 * ['was there already']]


def test_unknown_variant(ablate, capsys):
    with pytest.raises(SystemExit):
        ablate('default', 'windows')
    error = capsys.readouterr().err
    assert "expected some of ['default', 'half_groups'," in error
    assert "got ['windows']" in error
