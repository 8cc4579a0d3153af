"""The build, with a compiler that fails and without what it needs."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

COMPILERS = {
    'kernels.cpp:7:1: error: no such instruction': """#!/bin/sh
case "$*" in
  *csrc*) echo 'kernels.cpp:7:1: error: no such instruction' >&2; exit 1 ;;
esac
exec c++ "$@"
""",
    'ld: error: no such library': """#!/bin/sh
case "$*" in
  *' -shared '*) echo 'ld: error: no such library' >&2; exit 1 ;;
  *csrc*) while [ "$1" != -o ]; do shift; done; exec touch "$2" ;;
esac
exec c++ "$@"
""",
}


def build(folder, *options, **environment):
    """Run setup.py build_ext into a folder."""
    command = [sys.executable, *options, 'setup.py', 'build_ext', '--force']
    command += [f'--build-lib={folder}/lib', f'--build-temp={folder}/temp']
    environment = {'MAX_JOBS': '1', **os.environ, **environment}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )


@pytest.fixture(params=COMPILERS, ids=['compiler', 'linker'])
def says(request):
    return request.param


@pytest.fixture(params=['ninja', 'no ninja'])
def compiler(tmp_path, says, request):
    """Variables that name a compiler which fails, with and without ninja.

    What a compiler says without it, and a linker always, setuptools only prints if an
    extension is optional.
    """
    scripts = {'broken-c++': COMPILERS[says], 'ninja': '#!/bin/sh\nexit 1\n'}
    if request.param == 'ninja':
        if not pytest.importorskip('torch.utils.cpp_extension').is_ninja_available():
            pytest.skip('ninja is not installed')
        del scripts['ninja']
    for name, script in scripts.items():
        path = tmp_path / 'bin' / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
    path = f'{tmp_path}/bin:{os.environ["PATH"]}'
    return {'CXX': f'{tmp_path}/bin/broken-c++', 'PATH': path}


def test_a_failing_compiler_is_written_down(tmp_path, compiler, says):
    pytest.importorskip('mmcv')
    done = build(tmp_path, **compiler)
    assert done.returncode == 0, done.stderr
    assert 'without its compiled operators: building them failed' in done.stderr
    failure = (tmp_path / 'lib/mmdgt/_ext_failure.txt').read_text()
    assert says in failure
    assert not list(tmp_path.rglob('*.so'))


def test_a_failing_compiler_fails_where_kernels_were_asked_for(
    tmp_path, compiler, says
):
    pytest.importorskip('mmcv')
    done = build(tmp_path, **compiler, MMDGT_WITH_OPS='1')
    assert done.returncode != 0 and says in done.stdout + done.stderr
    assert not list(tmp_path.rglob('_ext*'))


def test_kernels_are_left_out_on_demand(tmp_path):
    done = build(tmp_path, MMDGT_WITH_OPS='0')
    assert done.returncode == 0, done.stderr
    assert 'without its compiled operators: MMDGT_WITH_OPS is 0' in done.stderr


@pytest.fixture
def without_torch(tmp_path):
    packages = tmp_path / 'packages'
    packages.mkdir()
    for name in ('setuptools', '_distutils_hack'):
        folder = Path(importlib.util.find_spec(name).origin).parent
        (packages / name).symlink_to(folder)
    # -S leaves out the packages of the environment.
    return functools.partial(build, tmp_path, '-S', PYTHONPATH=str(packages))


WITHOUT_TORCH = 'torch is not installed, or --no-build-isolation is missing'


def test_without_torch_they_are_left_out_too(without_torch):
    done = without_torch()
    assert done.returncode == 0, done.stderr
    assert f'without its compiled operators: {WITHOUT_TORCH}' in done.stderr


def test_without_torch_it_fails_where_kernels_were_asked_for(without_torch):
    done = without_torch(MMDGT_WITH_OPS='1')
    assert done.returncode == 1
    assert f'MMDGT_WITH_OPS is 1, but {WITHOUT_TORCH}' in done.stderr


def test_without_nvcc_it_fails_where_gpus_were_asked_for(tmp_path):
    pytest.importorskip('mmcv')
    settings = dict(FORCE_CUDA='1', CUDA_HOME=str(tmp_path), MMDGT_WITH_OPS='1')
    done = build(tmp_path, **settings)
    assert done.returncode == 1
    assert 'MMDGT_WITH_OPS is 1, but nvcc was not found' in done.stderr
