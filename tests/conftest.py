import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def repository():
    return REPOSITORY


@pytest.fixture(scope='session')
def run_tool():
    """Run a command of tools/ as a user does, in a process of its own."""

    def run(tool, *args, cwd=REPOSITORY, check=True):
        command = [sys.executable, str(REPOSITORY / 'tools' / tool), *map(str, args)]
        result = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            env={**os.environ, 'PYTHONWARNINGS': 'ignore'},
        )
        if check and result.returncode:
            raise AssertionError(f'{command}\n{result.stdout}\n{result.stderr}')
        return result

    return run


@pytest.fixture(scope='session')
def demo_data(tmp_path_factory, run_tool):
    """A handful of demo scenes: the folder that holds ade20k/ and coco/."""
    out = tmp_path_factory.mktemp('data') / 'demo'
    run_tool('make_demo_data.py', '--out', out, '--train', 8, '--val', 2, '--size', 64)
    return out


@pytest.fixture
def ade20k_sample():
    """Three real pictures of ADE20K with their annotations, where they are at hand."""
    folder = Path(
        os.environ.get('ADE20K_SAMPLE', REPOSITORY.parent / 'shared/data/ade20k-sample')
    )
    if not folder.is_dir():
        pytest.skip(
            f'no ADE20K pictures in {folder}; set ADE20K_SAMPLE to their folder'
        )
    return folder


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]
