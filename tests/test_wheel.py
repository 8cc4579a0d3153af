"""The package from a wheel, in an environment that has no clone."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

FOLDERS = ('mmdgt', 'configs', 'tools', 'csrc')
FILES = ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE')
NAME = 'upernet_dgt_t_ade20k'
TOOLS = ['train', 'test', 'infer', 'page', 'groups', 'export', 'compare', 'sweep-keys']
TOOLS += ['benchmark', 'demo-data']
BASES_ON_IT = f"_base_ = __import__('mmdgt').config_path('{NAME}')\n"
with_openmmlab = pytest.mark.skipif(
    not importlib.util.find_spec('mmengine'), reason='needs OpenMMLab'
)


def run(*command, **settings):
    environment = {**os.environ, 'PYTHONWARNINGS': 'ignore', 'MMDGT_WITH_OPS': '0'}
    return subprocess.run(
        list(map(str, command)),
        env=environment,
        capture_output=True,
        text=True,
        **settings,
    )


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    tree = tmp_path_factory.mktemp('tree')
    ignore = shutil.ignore_patterns('*.so', '__pycache__')
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, tree / name, symlinks=True, ignore=ignore)
    for name in FILES:
        shutil.copy(REPOSITORY / name, tree)
    pip = [sys.executable, '-m', 'pip', 'wheel', '--no-build-isolation', '--no-deps']
    done = run(*pip, '--wheel-dir', tree / 'dist', tree)
    assert done.returncode == 0, done.stderr
    (file,) = (tree / 'dist').glob('*.whl')
    return file


@pytest.fixture(scope='module')
def scripts(wheel, tmp_path_factory):
    """Its commands, in a new environment that sees the packages of this one.

    A .pth file adds a folder without those that its own .pth files name, so the
    checkout that this environment may have installed is not seen. That of setuptools is
    needed, for mmengine imports distutils, which Python 3.12 no longer has.
    """
    folder = tmp_path_factory.mktemp('fresh')
    done = run(sys.executable, '-m', 'venv', '--without-pip', folder)
    assert done.returncode == 0, done.stderr
    paths = [sysconfig.get_path(key) for key in ('purelib', 'platlib')]
    distutils = Path(paths[0]).glob('distutils-precedence.pth')
    lines = [*paths, *(file.read_text() for file in distutils)]
    (own,) = folder.glob('lib/python*/site-packages')
    (own / 'packages.pth').write_text('\n'.join(lines) + '\n')
    scripts = folder / 'bin'
    pip = [sys.executable, '-m', 'pip', '--python', scripts / 'python', 'install']
    done = run(*pip, '--no-deps', '--no-index', '--ignore-installed', wheel)
    assert done.returncode == 0, done.stderr
    return scripts


def test_holds_every_config_and_nothing_twice(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    there = {name.split('.mim/')[1] for name in names if '.mim/configs' in name}
    files = (REPOSITORY / 'configs').rglob('*.*')
    known = {str(f.relative_to(REPOSITORY)) for f in files if f.suffix != '.pyc'}
    assert there == known
    assert not any(name.startswith(('configs/', 'tools/', 'tests/')) for name in names)


def test_gives_the_path_of_a_config(scripts, tmp_path):
    done = run(scripts / 'mmdgt', 'config', NAME, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.is_relative_to(scripts.parent.resolve())
    assert path.read_text() == (REPOSITORY / f'configs/{NAME}.py').read_text()
    names = run(scripts / 'mmdgt', 'config', cwd=tmp_path).stdout.split()
    assert names == sorted(f.stem for f in (REPOSITORY / 'configs').glob('*.py'))


def test_says_which_configs_there_are(scripts, tmp_path):
    done = run(scripts / 'mmdgt', 'config', 'upernet', cwd=tmp_path)
    assert done.returncode == 2
    assert 'there is no config upernet here or in mmdgt, which has' in done.stderr
    assert NAME in done.stderr


@with_openmmlab
@pytest.mark.parametrize('name', [NAME, 'dgt_t_in1k', 'mask_rcnn_dgt_t_1x_coco'])
def test_is_a_base_of_other_configs(scripts, tmp_path, name):
    """In a process that has not imported mmdgt, as the frameworks' own tools."""
    if name.startswith('mask_rcnn') and not importlib.util.find_spec('mmdet'):
        pytest.skip('mmdet is not installed')
    config = tmp_path / 'mine.py'
    base = BASES_ON_IT.replace(NAME, name)
    config.write_text(base + 'model = dict(backbone=dict(num_keys=7))\n')
    program = (
        'from mmengine.config import Config;'
        f' cfg = Config.fromfile({str(config)!r});'
        ' print(cfg.model.backbone.num_keys, cfg.model.backbone.arch, cfg.filename)'
    )
    done = run(scripts / 'python', '-c', program, cwd=tmp_path)
    assert done.stdout.split() == ['7', 'tiny', str(config)], done.stderr


@with_openmmlab
def test_mmengine_finds_the_index(scripts, tmp_path):
    """As get_config and mim read it."""
    program = (
        'from mmengine.config.utils import _get_cfg_metainfo;'
        'from mmengine.utils import get_installed_path;'
        f'print(_get_cfg_metainfo(get_installed_path("mmdgt"), "{NAME}.py")["Config"])'
    )
    done = run(scripts / 'python', '-c', program, cwd=tmp_path)
    assert done.stdout.split() == [f'configs/{NAME}.py'], done.stderr


@with_openmmlab
def test_trains_and_tests(scripts, demo_data, tmp_path):
    settings = (
        f'data_root={demo_data}/ade20k',
        'train_cfg.max_iters=1',
        'train_cfg.val_interval=2',
        'train_dataloader.batch_size=2',
        'train_dataloader.num_workers=0',
        'test_dataloader.num_workers=0',
        'model.backbone.num_keys=20',
    )
    command = [scripts / 'mmdgt', 'train', 'upernet_dgt_t_demo', '--cfg-options']
    done = run(*command, *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / 'work_dirs/upernet_dgt_t_demo'
    command = [scripts / 'mmdgt', 'test', 'upernet_dgt_t_demo', folder / 'iter_1.pth']
    done = run(*command, '--cfg-options', *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (folder / 'metrics.json').is_file()


@with_openmmlab
@pytest.mark.parametrize('command', TOOLS)
def test_every_command_is_there(scripts, tmp_path, command):
    done = run(scripts / 'mmdgt', command, '--help', cwd=tmp_path)
    assert done.returncode == 0 and f'usage: mmdgt {command} ' in done.stdout, done


@pytest.mark.skipif(bool(importlib.util.find_spec('mmengine')), reason='has OpenMMLab')
@pytest.mark.parametrize('command', TOOLS)
def test_names_what_a_command_lacks(scripts, tmp_path, command):
    done = run(scripts / 'mmdgt', command, '--help', cwd=tmp_path)
    assert done.returncode == 2
    found = rf'{command} needs (mm\w+|cv2), which is not installed: pip install'
    assert re.search(found, done.stderr), done.stderr


def test_says_that_it_has_no_kernels(scripts, tmp_path):
    done = run(scripts / 'mmdgt', 'doctor', cwd=tmp_path)
    assert 'mmdgt._ext' in done.stdout and 'not loaded' in done.stdout, done.stderr
