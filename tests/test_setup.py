"""The build, with a compiler that fails and without what it needs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

COMPILER = """#!/bin/sh
case "$*" in
  *csrc*) echo 'kernels.cpp:7:1: error: no such instruction' >&2; exit 1 ;;
esac
exec c++ "$@"
"""


def build(folder, *options, **environment):
    """Run setup.py build_ext into a folder."""
    command = [sys.executable, *options, 'setup.py', 'build_ext', '--force']
    command += [f'--build-lib={folder}/lib', f'--build-temp={folder}/temp']
    environment = {'MAX_JOBS': '1', **os.environ, **environment}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def compiler(tmp_path):
    path = tmp_path / 'broken-c++'
    path.write_text(COMPILER)
    path.chmod(0o755)
    return str(path)


def test_a_failing_compiler_is_written_down(tmp_path, compiler):
    pytest.importorskip('mmcv')
    done = build(tmp_path, CXX=compiler)
    assert done.returncode == 0, done.stderr
    assert 'without its compiled operators: building them failed' in done.stderr
    failure = (tmp_path / 'lib/mmdgt/_ext_failure.txt').read_text()
    assert 'kernels.cpp:7:1: error: no such instruction' in failure
    assert not list(tmp_path.rglob('*.so'))


def test_a_failing_compiler_fails_where_kernels_were_asked_for(tmp_path, compiler):
    pytest.importorskip('mmcv')
    done = build(tmp_path, CXX=compiler, MMDGT_WITH_OPS='1')
    assert done.returncode != 0 and not list(tmp_path.rglob('_ext*'))


def test_kernels_are_left_out_on_demand(tmp_path):
    done = build(tmp_path, MMDGT_WITH_OPS='0')
    assert done.returncode == 0, done.stderr
    assert 'without its compiled operators: MMDGT_WITH_OPS is 0' in done.stderr


def test_without_torch_they_are_left_out_too(tmp_path):
    packages = tmp_path / 'packages'
    packages.mkdir()
    for name in ('setuptools', '_distutils_hack'):
        folder = Path(importlib.util.find_spec(name).origin).parent
        (packages / name).symlink_to(folder)
    # -S leaves out the packages of the environment.
    done = build(tmp_path, '-S', PYTHONPATH=str(packages))
    assert done.returncode == 0, done.stderr
    reason = 'torch is not installed, or --no-build-isolation is missing'
    assert f'without its compiled operators: {reason}' in done.stderr
