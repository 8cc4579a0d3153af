"""The command that trains variants, on tiny networks and a few pictures."""

import json
import re
import statistics
from argparse import Namespace

import pytest
from conftest import REPOSITORY, TINY_ARCH, TINY_HEADS

pytest.importorskip('mmpretrain')

ABLATION = """
_base_ = '{repository}/configs/dgt_ablation_demo.py'
comparison = dict(logged=('live_groups',))
default_hooks = dict(logger=dict(interval=1))
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
# Two small backbones on the demo's scenes, a folder in ADE20K's layout.
BACKBONES = """
_base_ = '{repository}/configs/comparisons/segmentation.py'
data_root = '{data}/ade20k'
classes = ('background', 'disk', 'ring', 'triangle', 'square', 'star', 'cross')
data = dict(
    type='BaseSegDataset',
    data_root=data_root,
    metainfo=dict(classes=classes),
    reduce_zero_label=True,
)
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
head = dict(num_classes=len(classes), channels=16)
model = dict(
    backbone=dict(arch={arch}),
    decode_head=head,
    auxiliary_head=head,
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=1),
    dict(type='PolyLR', by_epoch=False, begin=1, end=4),
]
learning_rates = dict(tried=(1e-6, 1e-3), share=0.5)
variants = dict(
    timm=dict(
        title='of timm',
        settings=dict(
            model=dict(
                backbone=dict(
                    _delete_=True,
                    type='mmpretrain.TIMMBackbone',
                    model_name='resnet10t',
                    features_only=True,
                    out_indices=(1, 2, 3, 4),
                )
            )
        ),
    ),
)
"""


@pytest.fixture
def train_variants(tmp_path, call_tool):
    def run(text, *arguments):
        config = tmp_path / 'tiny.py'
        config.write_text(text)
        call_tool(
            'train_variants',
            *(config, *arguments),
            *('--work-dir', tmp_path / 'runs', '--out', tmp_path / 'out'),
        )
        return json.loads((tmp_path / 'out/tiny.json').read_text())['results']

    return run


@pytest.fixture
def _in_this_process(monkeypatch, tools):
    """Trains here, for the sake of time; memory means nothing then."""
    monkeypatch.setattr(
        tools('train_variants'), 'in_fresh_process', lambda call, *args: call(*args)
    )


@pytest.fixture
def ablate(demo_data, train_variants):
    text = ABLATION.format(
        repository=REPOSITORY,
        arch=TINY_ARCH,
        head=TINY_HEADS['dgt_t_demo'],
        pipeline=PIPELINE,
    )

    def run(*variants, seeds=(0, 1)):
        return train_variants(
            text,
            *('--variants', *variants, '--seeds', *seeds, '--iterations', 2),
            *('--cfg-options', f'data_root={demo_data}/imagenet'),
        )

    return run


def states(text):
    return [line.rsplit(', ', 1)[1] for line in text.splitlines() if ' s, ' in line]


def last_logged(run):
    (file,) = run.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line['live_groups'] for line in lines if 'live_groups' in line][-1]


@pytest.mark.usefixtures('_in_this_process')
def test_ablation(ablate, tmp_path, capsys):
    variants = 'mirrored', 'shifted_window'
    rows = ablate(*variants)
    assert [row['variant'] for row in rows] == list(variants)
    # Of the paper's tables 1 and 4(c).
    assert rows[0]['reference'] == dict(
        params=24.09, flops=pytest.approx(4.35, rel=0.015), published=None
    )
    assert rows[1]['reference']['published'] == 82.8
    markdown = (tmp_path / 'out/tiny.md').read_text()
    for row in rows:
        scores = [run['score'] for run in row['runs']]
        assert [run['seed'] for run in row['runs']] == [0, 1]
        assert row['mean'] == pytest.approx(statistics.mean(scores), abs=0.01)
        spread = abs(scores[0] - scores[1]) / 2**0.5
        assert row['spread'] == pytest.approx(spread, abs=0.01)
        cells = f'{row["mean"]} | {row["spread"]} | {scores[0]}, {scores[1]} |'
        assert cells in markdown
        for run in row['runs']:
            assert run['cpu_seconds'] > 0
            assert {'torch', 'versions'} <= run['machine'].keys()
    assert (tmp_path / 'out/tiny.png').read_bytes().startswith(b'\x89PNG')
    # Of the last line of the training log; windows have no groups.
    live = [last_logged(tmp_path / f'runs/mirrored/seed_{seed}') for seed in (0, 1)]
    for run, share in zip(rows[0]['runs'], live, strict=True):
        assert run['logged'] == {'live_groups': pytest.approx(share, abs=1e-4)}
    assert rows[0]['logged']['live_groups'] == pytest.approx(sum(live) / 2, abs=1e-3)
    assert rows[1]['logged'] == {}
    ends = [row.rsplit(' | ', 1)[1] for row in markdown.splitlines()[-2:]]
    assert ends == [f'{rows[0]["logged"]["live_groups"]} |', '- |']
    # What differs has reached the runs.
    dumped = {v: (tmp_path / f'runs/{v}/seed_1/tiny.py').read_text() for v in variants}
    for variant, said in (
        ('mirrored', 'mirrored=True'),
        ('shifted_window', 'window_size=4'),
    ):
        assert [v for v in variants if said in dumped[v]] == [variant]
    assert all('seed=1' in text and 'max_iters=2' in text for text in dumped.values())

    # A second call trains nothing but what another config or package gave.
    for seed, what in enumerate(('config', 'package')):
        file = tmp_path / f'runs/mirrored/seed_{seed}/result.json'
        result = json.loads(file.read_text())
        file.write_text(json.dumps(result | {what: 'other'}))
    capsys.readouterr()
    (row,) = ablate('mirrored')
    assert row['mean'] == rows[0]['mean']
    assert states(capsys.readouterr().out) == ['trained', 'trained']
    ablate('mirrored')
    assert states(capsys.readouterr().out) == 2 * ['was there already']


@pytest.mark.usefixtures('_in_this_process')
def test_backbones_at_the_better_learning_rate(
    demo_data, train_variants, tmp_path, capsys
):
    text = BACKBONES.format(repository=REPOSITORY, data=demo_data, arch=TINY_ARCH)
    variants = 'dgt_t', 'timm'
    rows = train_variants(
        text, *('--variants', *variants, '--seeds', 0, '--iterations', 4)
    )
    assert states(capsys.readouterr().out) == 6 * ['trained']
    for row in rows:
        trials = {run['learning_rate']: run for run in row['trials']}
        assert trials.keys() == {1e-6, 1e-3}
        assert {run['iterations'] for run in row['trials']} == {2}
        best = max(trials.values(), key=lambda run: run['score'])
        assert row['learning_rate'] == row['runs'][0]['learning_rate']
        assert trials[row['learning_rate']]['score'] == best['score']
        assert row['runs'][0]['seed'] not in {run['seed'] for run in row['trials']}
    # timm's ResNet-10-T and heads of 16 channels are larger than the tiny DGT.
    assert rows[1]['here']['params'] > 5 > rows[0]['here']['params']
    assert (
        'that scored better in\n2 iterations' in (tmp_path / 'out/tiny.md').read_text()
    )


CLASSIFIERS = """
_base_ = '{repository}/configs/comparisons/classification.py'
data_root = '{data}/imagenet'
classes = {classes}
data_preprocessor = dict(num_classes=len(classes))
data = dict(data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(batch_size=2, dataset=data)
learning_rates = dict(share=0.5)
val_dataloader = dict(dataset=data)
model = dict(
    backbone=dict(arch={arch}),
    head=dict(num_classes=len(classes), in_channels=64, mid_channels=[8]),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=1),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=1, end=4),
]
"""


def test_classifiers_on_a_folder_of_pictures(demo_data, train_variants, tmp_path):
    """In processes of their own, whose memory is measured."""
    classes = sorted(path.name for path in (demo_data / 'imagenet/train').iterdir())
    text = CLASSIFIERS.format(
        repository=REPOSITORY, data=demo_data, classes=classes, arch=TINY_ARCH
    )
    (row,) = train_variants(
        text, *('--variants', 'dgt_t', '--seeds', 0, '--iterations', 4)
    )
    runs = *row['trials'], *row['runs']
    assert [run['iterations'] for run in runs] == [2, 2, 4]
    # At least the weights, their gradients and AdamW's two averages.
    assert all(r['peak_bytes'] > 16e6 * row['here']['params'] for r in runs)
    assert 'top-1 (%)' in (tmp_path / 'out/tiny.md').read_text()


def test_the_example_of_the_page(tmp_path, tools):
    """A backbone that the page adds gets heads of its own channels."""
    page = (REPOSITORY / 'docs/real_pictures.md').read_text()
    (example,) = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    config = tmp_path / 'my_comparison.py'
    config.write_text(example.replace("'configs/", f"'{REPOSITORY}/configs/"))
    args = Namespace(
        config=config,
        cfg_options={},
        work_dir=None,
        iterations=None,
        launcher='none',
        local_rank=0,
        allow_partial=False,
    )
    cfg = tools('train_variants').configure(args, 'pvt', seed=3)
    assert cfg.model.decode_head.in_channels == [64, 128, 320, 512]  # of PVT's paper
    assert cfg.model.auxiliary_head.in_channels == 320
    assert cfg.model.auxiliary_head.num_classes == 3
    assert cfg.randomness.seed == 3


def test_unknown_variant(ablate, capsys):
    with pytest.raises(SystemExit):
        ablate('default', 'windows')
    error = capsys.readouterr().err
    assert "expected some of ['default', 'half_groups'," in error
    assert "got ['windows']" in error


def test_no_variants(train_variants, capsys):
    with pytest.raises(SystemExit):
        train_variants(f'_base_ = {str(REPOSITORY / "configs/dgt_t_demo.py")!r}')
    assert 'has no variants' in capsys.readouterr().err
