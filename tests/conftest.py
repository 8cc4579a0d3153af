import contextlib
import importlib.util
import multiprocessing
import os
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))
# What OpenMMLab is needed for. The others run with torch, numpy and pytest alone.
NEED_OPENMMLAB = [
    f'test_{room}.py'
    for room in (
        'train_variants',
        'bad_data',
        'checkpoints',
        'compare_backbones',
        'configs',
        'custom_data',
        'demo_data',
        'demo_page',
        'detection',
        'distillation',
        'distributed',
        'doctor',
        'export',
        'fine_tuning',
        'group_pictures',
        'hooks',
        'inference',
        'notebook',
        'openmmlab',
        'precision',
        'pretrained',
        'recipes',
        'resume',
        'sweep_keys',
        'tools',
    )
]
# MMDGT_ROOMS=core or =openmmlab runs the one part or the other.
rooms = os.environ.get('MMDGT_ROOMS', 'all')
if rooms == 'core' or not importlib.util.find_spec('mmengine'):
    collect_ignore = NEED_OPENMMLAB
elif rooms == 'openmmlab':
    files = Path(__file__).parent.glob('test_*.py')
    collect_ignore = [x.name for x in files if x.name not in NEED_OPENMMLAB]

if emulated := os.environ.get('MMDGT_EMULATED'):
    # The CUDA kernels as `make emulate` compiles them serve CPU tensors in place of
    # the extension.
    (library,) = Path(emulated).glob('mmdgt/_ext*.so')
    spec = importlib.util.spec_from_file_location('mmdgt._ext', library)
    sys.modules['mmdgt._ext'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules['mmdgt._ext'])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_visualizers():
    """Those of one name, the second of the start, are one object: mmengine keeps it.

    The folder it writes to goes with the test that made it.
    """
    yield
    if visualization := sys.modules.get('mmengine.visualization'):
        kinds = [visualization.Visualizer]
        for kind in kinds:
            kind._instance_dict.clear()
            kinds += kind.__subclasses__()


@pytest.fixture
def repository():
    return REPOSITORY


@pytest.fixture(scope='session')
def run_tool():
    """Run a command of tools/ as a user does, in a process of its own."""

    def run(tool, *args, cwd=REPOSITORY, check=True, **environment):
        interpreter = [sys.executable] if tool.endswith('.py') else []
        command = [*interpreter, str(REPOSITORY / 'tools' / tool), *map(str, args)]
        result = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                'PYTHON': sys.executable,
                'PYTHONWARNINGS': 'ignore',
                **environment,
            },
        )
        if check and result.returncode:
            raise AssertionError(f'{command}\n{result.stdout}\n{result.stderr}')
        return result

    return run


@pytest.fixture
def tools(monkeypatch):
    """Import a command of tools/."""
    monkeypatch.syspath_prepend(str(REPOSITORY / 'tools'))
    return importlib.import_module


@pytest.fixture
def call_tool(monkeypatch, tools):
    """Call a command of tools/ in this process, which has the frameworks loaded."""

    def call(tool, *args):
        monkeypatch.setattr(sys, 'argv', [tool, *map(str, args)])
        tools(tool).main()

    return call


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


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@pytest.fixture(scope='session')
def on_two_ranks(tmp_path_factory):
    """Call a function in the two processes of a gloo group, get both results."""
    store = tmp_path_factory.mktemp('group') / 'store'
    spawn = multiprocessing.get_context('spawn')
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                ProcessPoolExecutor(1, spawn, _join_group, (f'file://{store}', rank))
            )
            for rank in range(2)
        ]

        def call(function, *args):
            results = [rank.submit(function, *args) for rank in ranks]
            return [result.result() for result in results]

        yield call


def _join_group(store, rank):
    os.environ['LOCAL_RANK'] = str(rank)  # as torchrun sets it
    torch.distributed.init_process_group(
        'gloo', store, timedelta(minutes=1), world_size=2, rank=rank
    )


TINY_ARCH = dict(
    _delete_=True,
    dims=(16, 32, 64, 64),
    depths=(1, 1, 2, 1),
    num_heads=(2, 2, 4, 4),
    stem_dims=8,
)
TINY_MODEL = """
_base_ = '{configs}/{base}.py'
model = dict(
    backbone=dict(arch={arch}, num_keys=20),
    {heads}
)
"""
TINY_HEADS = {
    'upernet_dgt_t_demo': 'decode_head=dict(in_channels=[16, 32, 64, 64], channels=16),'
    ' auxiliary_head=dict(in_channels=64, channels=16)',
    'mask_rcnn_dgt_t_demo': 'neck=dict(in_channels=[16, 32, 64, 64])',
    'dgt_t_demo': 'head=dict(in_channels=64, mid_channels=[32])',
}


@pytest.fixture(scope='session')
def tiny_models(tmp_path_factory):
    """For every framework a config and a checkpoint of random weights."""
    from mmengine.config import Config

    from mmdgt.openmmlab.apis.inference import Predictor

    torch.manual_seed(0)
    models = {}
    for base, heads in TINY_HEADS.items():
        file = tmp_path_factory.mktemp('tiny') / f'{base}.py'
        configs = REPOSITORY / 'configs'
        file.write_text(
            TINY_MODEL.format(configs=configs, base=base, arch=TINY_ARCH, heads=heads)
        )
        cfg = Config.fromfile(file)
        predictor = Predictor(cfg, None, 'cpu')
        meta = dict(dataset_meta=predictor.metainfo)  # as the Runner stores it
        checkpoint = file.with_suffix('.pth')
        torch.save(dict(state_dict=predictor.model.state_dict(), meta=meta), checkpoint)
        models[cfg.default_scope] = (str(file), str(checkpoint))
    return models
