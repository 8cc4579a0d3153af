"""The tables of sizes, against the published figures."""

import csv
import json

import pytest

for _framework in ('mmseg', 'mmdet', 'mmpretrain'):
    pytest.importorskip(_framework)


def read(folder):
    with (folder / 'backbones.csv').open() as file:
        return list(csv.DictReader(file))


def test_published_sizes(tmp_path, call_tool):
    call_tool('compare_backbones', '--out', tmp_path, '--only', 'Swin-T', 'PVT-S')
    rows = read(tmp_path)
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


# Parameters (M) of the ImageNet classifier by its authors (github.com/dingmyu/davit,
# raoyongming/HorNet, google-research/maxvit, NVlabs/GCVit), of which 1000 weights for
# every channel of the last stage, and a bias, are the classifier's; MaxViT has a layer
# of as many channels as the last stage more.
@pytest.mark.parametrize(
    'name, published, channels, hidden',
    [
        ('DaViT-T', 28.3, 768, False),
        ('HorNet-S', 50, 768, False),
        ('MaxViT-T', 31, 512, True),
        ('GC-ViT-T', 28, 512, False),
    ],
)
def test_backbones_are_the_published_ones(name, published, channels, hidden, tools):
    from mmengine.registry import MODELS

    compare_backbones = tools('compare_backbones')
    config = compare_backbones.BACKBONES[name]
    if compare_backbones.needs_timm(config):
        pytest.importorskip('timm')
    params = sum(p.numel() for p in MODELS.build(config).parameters())
    params += 1000 * (channels + 1) + hidden * channels * (channels + 1)
    assert params / 1e6 == pytest.approx(published, rel=0.015)


def test_time(tmp_path, call_tool, tools, monkeypatch):
    compare_backbones = tools('compare_backbones')
    tiny = dict(dims=(16, 32, 64, 64), depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 4))
    config = dict(type='DGT', arch=tiny | dict(stem_dims=8), num_keys=20)
    monkeypatch.setattr(compare_backbones, 'BACKBONES', {'one': config, 'two': config})
    upernet, mask_rcnn = (
        table._replace(size=(64, 64)) for table in compare_backbones.TABLES
    )
    tables = [
        upernet._replace(classes=({'one': (1, 2)},)),
        mask_rcnn._replace(classes=({'two': None},)),
    ]
    monkeypatch.setattr(compare_backbones, 'TABLES', tables)

    def run(*time):
        arguments = ('--out', tmp_path, '--device', 'cpu', '--rounds', 1, *time)
        call_tool('compare_backbones', *arguments)
        return json.loads((tmp_path / 'backbones.json').read_text())['results']

    (first,) = run('--time', 'one')
    assert first['backbone'] == 'one'
    model, _ = compare_backbones.prepare(tables[0], config, 'cpu')
    weights = sum(p.nbytes for p in model.parameters())
    assert weights < first['peak_bytes'] < weights + 2**30
    assert first['rounds'] == 1 and first['ms'] > 0

    # What is measured stays, when more is measured and when nothing is.
    def here(function, *args):
        return function(*args)  # a second process adds nothing but seconds

    monkeypatch.setattr(compare_backbones, 'in_fresh_process', here)
    second = run('--time')
    assert [row['backbone'] for row in second] == ['one', 'two']
    assert second[0] == first
    assert run() == second
    table = {(row['table'], row['backbone']): row for row in read(tmp_path)}
    for row in second:
        shown = table[row['table'], row['backbone']]
        assert float(shown['time (ms)']) == pytest.approx(row['ms'], abs=0.5)
        mebibytes = row['peak_bytes'] / 2**20
        assert float(shown['peak memory (MiB)']) == pytest.approx(mebibytes, abs=0.5)

    kept = compare_backbones.Measurements(tmp_path / 'backbones.json')
    with pytest.raises(ValueError, match=r'was measured on .* this is .*another'):
        kept.go_on({'cpu': 'another'})


def test_without_timm(tmp_path, call_tool, tools, monkeypatch, capsys):
    compare_backbones = tools('compare_backbones')
    monkeypatch.setattr(
        compare_backbones.importlib.util, 'find_spec', lambda name: None
    )
    names = ('Res50', 'MaxViT-T')
    call_tool('compare_backbones', '--out', tmp_path, '--only', *names)
    assert [row['backbone'] for row in read(tmp_path)] == ['Res50']
    assert 'pip install timm"): MaxViT-T' in capsys.readouterr().out
