"""The command-line tools as a user runs them."""

import dataclasses
import importlib.util
import json
import os
import pickle
import shutil
import subprocess

import cv2
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from mmengine.config import Config

from mmdgt.openmmlab.apis.config import check_data
from mmdgt.openmmlab.engine import Interrupted

TINY = (
    'model.backbone.num_keys=20',
    'model.decode_head.channels=16',
    'model.auxiliary_head.channels=16',
    'train_dataloader.num_workers=0',
    'val_dataloader.num_workers=0',
    'test_dataloader.num_workers=0',
)
CENTROIDS = 'backbone.stages.0.blocks.0.attention.centroids'


@pytest.fixture(scope='session')
def trained(demo_data, run_tool, tmp_path_factory):
    """Two iterations of the demo config on a few scenes, from an empty folder."""
    folder = tmp_path_factory.mktemp('run')
    args = (
        f'data_root={demo_data}/ade20k',
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
        'default_hooks.checkpoint.interval=1',
        'default_hooks.checkpoint.max_keep_ckpts=-1',
        'train_dataloader.batch_size=2',
        *TINY,
    )
    config = REPOSITORY / 'configs/upernet_dgt_t_demo.py'
    command = (config, '--work-dir', folder / 'wd', '--cfg-options', *args)
    run_tool('train.py', *command, cwd=folder)
    return folder / 'wd', command


def options(trained):
    return trained[1][trained[1].index('--cfg-options') + 1 :]


def test_train_leaves_a_checkpoint(trained):
    work_dir, _ = trained
    state = torch.load(work_dir / 'iter_2.pth', weights_only=True)['state_dict']
    torch.testing.assert_close(state[CENTROIDS].norm(dim=-1), torch.ones(2, 48))


def test_resume_goes_on_from_the_last_checkpoint(trained, run_tool, tmp_path):
    """As after a kill: iteration 1 is the last that was saved."""
    work_dir, command = trained
    shutil.copy(work_dir / 'iter_1.pth', tmp_path)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_1.pth'))
    resumed = (command[0], '--resume', '--work-dir', tmp_path, *command[3:])
    log = run_tool('train.py', *resumed)
    assert 'resumed epoch: 0, iter: 1' in log.stdout + log.stderr
    assert (tmp_path / 'iter_2.pth').is_file()


@pytest.mark.parametrize('tta', [False, True])
def test_test_evaluates_and_draws(trained, demo_data, run_tool, tmp_path, tta):
    work_dir, command = trained
    run_tool(
        'test.py',
        command[0],
        work_dir / 'iter_2.pth',
        '--work-dir',
        tmp_path,
        '--show-dir',
        tmp_path / 'show',
        '--out',
        tmp_path / 'maps',
        *['--tta'] * tta,
        '--cfg-options',
        *options(trained),
    )
    metrics = json.loads(
        (tmp_path / ('metrics_tta.json' if tta else 'metrics.json')).read_text()
    )
    assert 0 <= metrics['mIoU'] <= 100
    assert len(list((tmp_path / 'show').rglob('*.png'))) == 2
    labels = sorted((tmp_path / 'maps').glob('*.png'))
    truth = sorted((demo_data / 'ade20k/annotations/validation').glob('*.png'))
    assert [path.name for path in labels] == [path.name for path in truth]

    # The metric again, from the files.
    intersection, union = np.zeros(8), np.zeros(8)
    for ours, true in zip(labels, truth, strict=True):
        ours, true = (cv2.imread(str(path), 0) for path in (ours, true))
        for label in range(1, 8):
            one, other = (ours == label) & (true > 0), true == label
            intersection[label] += (one & other).sum()
            union[label] += (one | other).sum()
    iou = 100 * intersection[1:] / np.where(union[1:], union[1:], np.nan)
    assert metrics['mIoU'] == pytest.approx(np.nanmean(iou), abs=0.01)


def test_real_ade20k_pictures(ade20k_sample, repository, run_tool, tmp_path):
    """The unchanged config: data_root, iterations and workers apart."""
    for kind in ('images', 'annotations'):
        (tmp_path / 'ade' / kind).mkdir(parents=True)
        for split in ('training', 'validation'):
            (tmp_path / 'ade' / kind / split).symlink_to(
                (ade20k_sample / kind / 'validation').resolve()
            )
    config = repository / 'configs/upernet_dgt_t_ade20k.py'
    overrides = (
        f'data_root={tmp_path}/ade',
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
        'train_dataloader.num_workers=0',
        'val_dataloader.num_workers=0',
        'test_dataloader.num_workers=0',
    )
    work_dir = tmp_path / 'wd'
    run_tool('train.py', config, '--work-dir', work_dir, '--cfg-options', *overrides)
    for tta in (False, True):
        run_tool(
            'test.py',
            config,
            work_dir / 'iter_2.pth',
            '--work-dir',
            work_dir,
            '--show-dir',
            tmp_path / f'show{tta:d}',
            *['--tta'] * tta,
            '--cfg-options',
            *overrides,
        )
        assert len(list((tmp_path / f'show{tta:d}').rglob('*.png'))) == 3
    for name in ('metrics.json', 'metrics_tta.json'):
        assert 0 <= json.loads((work_dir / name).read_text())['mIoU'] <= 100


@pytest.fixture
def built(call_tool, tools, monkeypatch, tmp_path):
    """The config that tools/train.py would train with, by its text and options."""

    def call(text, *options):
        file = tmp_path / 'config.py'
        file.write_text(text)
        found = []

        def build(cfg):
            found.append(cfg)
            raise Interrupted

        monkeypatch.setattr(tools('train'), 'build_runner', build)
        call_tool('train', file, *options)
        return found[0]

    return call


def test_train_looks_for_the_data_of_the_validation_that_there_is(built, tmp_path):
    text = f"""
train_dataloader = dict(dataset=dict(type='X', data_root={str(tmp_path)!r}))
val_dataloader = dict(dataset=dict(type='X', data_root='nowhere'))
"""
    assert 'val_cfg' not in built(text)
    assert built(text + 'val_cfg = None').val_cfg is None
    for loop in ("dict(type='ValLoop')", 'dict()'):  # one and the same
        with pytest.raises(FileNotFoundError, match=r'val_dataloader .*nowhere'):
            built(f'{text}val_cfg = {loop}')


def test_what_train_resumes(built, tmp_path):
    text = f"""
train_dataloader = dict(dataset=dict(type='X', data_root={str(tmp_path)!r}))
load_from = 'pretrained.pth'
val_cfg = None
"""
    for options, expected in (
        ([], (None, 'pretrained.pth')),
        (['--resume'], ('auto', 'pretrained.pth')),
        (['--resume', 'x.pth'], (True, 'x.pth')),
    ):
        cfg = built(text, *options)
        assert (cfg.get('resume'), cfg.load_from) == expected


def test_no_data(repository, run_tool, tmp_path):
    config = repository / 'configs/upernet_dgt_t_ade20k.py'
    result = run_tool('train.py', config, cwd=tmp_path, check=False)
    assert result.returncode
    assert 'expects data in data/ade/ADEChallengeData2016' in result.stderr
    assert '--cfg-options data_root=DIR' in result.stderr
    assert 'Traceback' not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('prefix', ['train', ''])
def test_a_prefix_by_itself(tmp_path, prefix):
    """As mmpretrain takes them, which reads the same folder."""
    from mmpretrain.datasets import CustomDataset

    folder = tmp_path / prefix
    for name in ('cat', 'dog'):
        (folder / name).mkdir(parents=True)
        cv2.imwrite(str(folder / name / 'x.png'), np.zeros((4, 4, 3), np.uint8))
    (tmp_path / 'notes.txt').write_text('no picture')
    settings = dict(data_root=str(tmp_path), data_prefix=prefix)
    assert len(CustomDataset(**settings)) == 2
    loader = dict(dataset=dict(type='CustomDataset', **settings))
    cfg = Config(dict(train_dataloader=loader))
    check_data(cfg, 'train_dataloader')
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=f'expects data in {folder} '):
        check_data(cfg, 'train_dataloader')


@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU has float16')
def test_float16_without_a_gpu(trained, run_tool):
    result = run_tool('train.py', *trained[1], '--amp', check=False)
    assert result.returncode == 2
    assert 'float16 needs a GPU; here use --amp bfloat16' in result.stderr


def test_label_of_no_class(trained, demo_data, run_tool, tmp_path):
    _, command = trained
    data = tmp_path / 'data'
    shutil.copytree(demo_data / 'ade20k', data)
    for path in (data / 'annotations/training').iterdir():
        labels = cv2.imread(str(path), 0)
        labels[:9] = 8
        cv2.imwrite(str(path), labels)
    result = run_tool(
        'train.py',
        command[0],
        '--work-dir',
        tmp_path / 'wd',
        '--cfg-options',
        *options(trained),
        f'data_root={data}',
        check=False,
    )
    assert result.returncode
    assert 'has label 7, expected 0 to 6' in result.stderr
    assert 'annotations/training/' in result.stderr


def test_classification(repository, run_tool, tmp_path):
    """ImageNet's folders, 1000 classes of one picture each, a few of them used."""
    picture = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    for split in ('train', 'val'):
        for number in range(1000):
            folder = tmp_path / 'imagenet' / split / f'n{number:08}'
            folder.mkdir(parents=True)
            cv2.imwrite(str(folder / 'picture.jpg'), picture)
    loaders = [
        f'{split}_dataloader.{setting}'
        for split in ('train', 'val', 'test')
        for setting in ('batch_size=2', 'num_workers=0', 'dataset.indices=2')
    ]
    config = repository / 'configs/dgt_t_in1k.py'
    overrides = ('--cfg-options', f'data_root={tmp_path}/imagenet', *loaders)
    work_dir = tmp_path / 'wd'
    run_tool(
        'train.py', config, '--work-dir', work_dir, *overrides, 'train_cfg.max_epochs=1'
    )
    for tta in ([], ['--tta']):
        out = tmp_path / 'predictions.pkl'
        checkpoint = work_dir / 'epoch_1.pth'
        run_tool(
            'test.py',
            config,
            checkpoint,
            *tta,
            '--out',
            out,
            '--work-dir',
            work_dir,
            *overrides,
        )
        assert len(pickle.loads(out.read_bytes())) == 2
    metrics = json.loads((work_dir / 'metrics.json').read_text())
    assert set(metrics) == {'accuracy/top1', 'accuracy/top5'}


def test_detection(demo_data, repository, run_tool, tmp_path):
    """Two iterations on demo scenes, and both evaluations."""
    config = repository / 'configs/mask_rcnn_dgt_t_demo.py'
    overrides = (
        '--work-dir',
        tmp_path,
        '--cfg-options',
        f'data_root={demo_data}/coco',
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=4',
        'model.backbone.num_keys=20',
        'model.backbone.init_cfg.checkpoint=None',
        'model.test_cfg.rcnn.score_thr=0.0',
        *(f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')),
    )
    run_tool('train.py', config, *overrides)
    found = {}
    for tta in (False, True):
        out, show = tmp_path / f'{tta}.pkl', tmp_path / f'show{tta:d}'
        run_tool(
            'test.py',
            config,
            tmp_path / 'epoch_1.pth',
            *['--tta'] * tta,
            '--out',
            out,
            '--show-dir',
            show,
            *overrides,
        )
        assert len(list(show.glob('*.jpg'))) == 2
        metrics = json.loads(
            (tmp_path / ('metrics_tta.json' if tta else 'metrics.json')).read_text()
        )
        assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= metrics.keys()
        found[tta] = pickle.loads(out.read_bytes())
    for one, other in zip(found[False], found[True]):
        assert one['img_id'] == other['img_id'] and one['ori_shape'] == (64, 64)
        # A model that knows nothing finds the most there may be, in the original size.
        for prediction in (one['pred_instances'], other['pred_instances']):
            assert len(prediction['bboxes']) == len(prediction['masks']) == 100
            assert prediction['masks'].shape[1:] == (64, 64)
    run_tool('demo_report.py', config, tmp_path / 'epoch_1.pth', *overrides[2:])
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['mask AP50, multi-scale'] == 100 * metrics['coco/segm_mAP_50']
    # Two rows of three pictures, three times as large, below the titles.
    picture = cv2.imread(str(tmp_path / 'predictions.png'))
    assert picture.shape == (30 + 2 * (3 * 64 + 6), 3 * (3 * 64 + 6), 3)


@pytest.fixture
def benchmark_model(run_tool, tmp_path):
    def run(*args):
        options = ('--rounds', 1, '--no-memory', '--out', tmp_path, *args)
        out = run_tool('benchmark_model.py', *options).stdout
        return json.loads((tmp_path / 'model.json').read_text()), out

    return run


def test_benchmark_of_backbones(benchmark_model, tmp_path):
    models, sizes = ('--models', 'dgt_t,swin_t'), ('--sizes', '32x32,64x32')
    result, out = benchmark_model(
        *models, *sizes, '--modes', 'eager,deploy', '--passes', 'forward', '--breakdown'
    )
    assert {'torch', 'cpu', 'versions'} <= result['machine'].keys()
    keys = ('size', 'model', 'mode')
    assert [tuple(row[key] for key in keys) for row in result['results']] == [
        (size, *rival)
        for size in ('32x32', '64x32')
        for rival in (('dgt_t', 'eager'), ('dgt_t', 'deploy'), ('swin_t', 'eager'))
    ]
    for row in result['results']:
        assert row['images_per_s'] == pytest.approx(1e3 / row['ms'], rel=1e-2)
    for row in result['breakdown']:
        assert 0 < row['attention'] < 1 and 0 < row['convolution'] < 1
    assert 'dgt_t deploy' in out
    assert (tmp_path / 'model_backbone_forward_1_float32_contiguous.png').is_file()


@pytest.fixture
def git(tmp_path, monkeypatch):
    """Run git in a folder below, where all repositories are of its own."""
    for name in [name for name in os.environ if name.startswith('GIT_')]:
        monkeypatch.delenv(name)
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path))
    author = ('-c', 'user.name=x', '-c', 'user.email=x@example.com')

    def run(folder, *command):
        done = subprocess.run(
            ['git', *author, *command], cwd=folder, stdout=subprocess.PIPE, check=True
        )
        return done.stdout.decode().strip()

    return run


def test_results_name_the_commit_of_the_tools_alone(git, tmp_path, monkeypatch):
    """Not that of a repository where the caller stands or the package is installed."""
    elsewhere, tools = tmp_path / 'elsewhere', tmp_path / 'own/tools'
    for folder in (elsewhere, tools):
        folder.mkdir(parents=True)
    file = shutil.copy(REPOSITORY / 'tools/measure.py', tools)
    spec = importlib.util.spec_from_file_location('copy_of_measure', file)
    measure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measure)

    def recorded():
        info = measure.machine('cpu')
        assert info['torch'] == torch.__version__ and 'cpu' in info
        return {key: info[key] for key in ('commit', 'clean') if key in info}

    monkeypatch.chdir(elsewhere)
    assert recorded() == {}
    for folder in (elsewhere, tools.parent):
        git(folder, 'init')
        (folder / 'x').write_text('of the first commit')
        git(folder, 'add', 'x')
        git(folder, 'commit', '-m', 'Start')
    assert recorded() == {}
    git(tools, 'add', '.')
    git(tools, 'commit', '-m', 'Go on')
    commit = git(tools, 'rev-parse', 'HEAD')
    assert recorded() == dict(commit=commit, clean=True)
    (tools.parent / 'x').write_text('of no commit')
    assert recorded() == dict(commit=commit, clean=False)


def test_the_rate_of_a_loader(demo_data, run_tool, tmp_path):
    config = REPOSITORY / 'configs/upernet_dgt_t_demo.py'
    options = ('--samples', 3, '--rounds', 2, '--out', tmp_path / 'rate.json')
    data = ('--cfg-options', f'data_root={demo_data}/ade20k')
    said = run_tool('benchmark_loader.py', config, *options, *data).stdout
    (row,) = json.loads((tmp_path / 'rate.json').read_text())['results']
    shares = row['share_percent']
    assert list(shares)[:2] == ['LoadImageFromFile', 'LoadAnnotations']
    assert sum(shares.values()) == pytest.approx(100, abs=len(shares) / 2)
    low, high = row['pictures_per_s_quartiles']
    assert 0 < low <= row['pictures_per_s'] <= high and row['rounds'] == 2
    assert f'{row["pictures_per_s"]} pictures a second and core' in said


def test_every_planted_bug_has_its_place(tools):
    tool = tools('plant_bugs')
    for bug in tool.BUGS:
        tool.check_place(bug)
    with pytest.raises(ValueError, match='should have once'):
        tool.check_place(dataclasses.replace(tool.BUGS[0], old='no kernel has this'))


@pytest.mark.parametrize(
    'tool, name, message',
    [
        ('benchmark_op.py', 'there', 'expected a folder'),
        ('benchmark_model.py', 'there/below', 'expected a folder'),
        ('benchmark_neighbours.py', '.', 'expected a file'),
        ('fuzz_ops.py', 'there/below.json', 'expected a folder'),
    ],
)
def test_a_wrong_place_for_results_ends_it_at_once(
    run_tool, tmp_path, tool, name, message
):
    (tmp_path / 'there').write_text('a file')
    result = run_tool(tool, '--out', tmp_path / name, check=False)
    assert result.returncode == 2 and message in result.stderr
    assert (tmp_path / 'there').read_text() == 'a file'


def test_benchmark_of_training(benchmark_model):
    result, _ = benchmark_model(
        *('--tasks', 'upernet,mask_rcnn', '--models', 'dgt_t', '--sizes', '32x32'),
        *('--passes', 'train', '--batches', 2),
    )
    tasks = [row['task'] for row in result['results']]
    assert tasks == ['upernet', 'mask_rcnn']
    assert not any('error' in row for row in result['results'])


def test_benchmark_of_the_operators(run_tool, tmp_path):
    rivals = ['fused', 'eager', 'group_loop', 'dense']
    out = run_tool(
        'benchmark_op.py',
        *('--sets', '', '--lengths', '400,512', '--dtypes', 'float32'),
        *('--draws', 'one', '--passes', 'forward,both', '--rivals', ','.join(rivals)),
        *('--rounds', 1, '--device', 'cpu', '--no-memory', '--out', tmp_path),
    ).stdout
    rows = json.loads((tmp_path / 'op.json').read_text())['results']
    assert [(row['L'], row['pass'], row['rival']) for row in rows] == [
        (length, which, rival)
        for length in (400, 512)
        for which in ('forward', 'both')
        for rival in rivals
    ]
    lines = [line.split() for line in out.splitlines()]
    table = [line for line in lines if line and line[0] in ('L400', 'L512')]
    shown = [float(time) for line in table for time in line[4:]]
    assert shown == [pytest.approx(row['us'], abs=0.06) for row in rows]
    assert (tmp_path / 'op.png').is_file()


def test_peak_memory_of_a_call(tools):
    measure = tools('measure')
    added = measure.in_fresh_process(measure.added_bytes, make_and_drop, 'cpu', 2)
    # Two of three are there at a time, and the second call adds nothing. Meanwhile the
    # interpreter may give back pages, of which 0.1 MiB have been seen.
    assert 2 * NUMBERS * 4 - 2**20 <= added < 2.2 * NUMBERS * 4


NUMBERS = 10_000_000


def make_and_drop():
    first = torch.ones(NUMBERS)
    del first
    second, third = torch.ones(NUMBERS), torch.ones(NUMBERS)
    return second.shape == third.shape


@pytest.mark.parametrize(
    ('tool', 'option', 'first'),
    (('benchmark_model.py', '--models', 'dgt_t'), ('benchmark_op.py', '--sets', 'A')),
)
def test_benchmark_of_what_is_unknown(run_tool, tool, option, first):
    result = run_tool(tool, option, f'{first},dgt_x', check=False)
    assert result.returncode
    assert f'dgt_x: choose from {first}, ' in result.stderr


@pytest.mark.parametrize(
    ('tool', 'arguments'),
    (
        ('compare_backbones.py', ('--only', 'Swin-T')),
        ('make_golden.py', ()),
    ),
)
def test_committed_results_are_replaced_only_by_force(run_tool, tool, arguments):
    def committed():
        return {
            path: path.read_bytes()
            for folder in ('docs', 'tests/data')
            for path in (REPOSITORY / folder).rglob('*')
            if path.is_file()
        }

    before = committed()
    result = run_tool(tool, *arguments, check=False)
    assert result.returncode == 2
    assert 'has results already: replace them with --force' in result.stderr
    assert committed() == before
