"""Every tool takes a checkpoint whole, runs nothing in it, and says what is wrong."""

import functools
import http.server
import pickle
import threading

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, init_default_scope

from mmdgt.openmmlab import checkpoints

KEY = 'backbone.stem.0.weight'


class Evil:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return self.mark.touch, ()


def without_a_tensor(state):
    return {key: x for key, x in state.items() if key != KEY}


def with_nan(state):
    x = state[KEY].clone()
    x[-1, -1, -1, -1] = float('nan')
    return {**state, KEY: x}


def of_another_shape(state):
    return {**state, KEY: state[KEY][:-1]}


def with_another_tensor(state):
    return {**state, 'neck.weight': torch.ones(1)}


MISFITS = {
    without_a_tensor: rf'missing: 1 \({KEY}\)',
    with_nan: rf'not finite: 1 \({KEY}\)',
    of_another_shape: rf'another shape: 1 \({KEY} \(7, 3, 3, 3\) there, \(8, 3, 3, 3\)',
    with_another_tensor: r'unexpected: 1 \(neck\.weight\)',
}


@pytest.fixture
def evil(tmp_path):
    """A file, and what its code leaves when it is run."""
    mark = tmp_path / 'ran'
    (tmp_path / 'evil.pth').write_bytes(pickle.dumps({'state_dict': Evil(mark)}))
    return tmp_path / 'evil.pth', mark


@pytest.fixture
def tool(tiny_models, call_tool, demo_data, tmp_path):
    """Call a tool with a checkpoint for the tiny segmentor."""
    config, _ = tiny_models['mmseg']
    cv2.imwrite(str(tmp_path / 'picture.png'), np.zeros((40, 50, 3), np.uint8))
    options = ('--cfg-options', f'data_root={demo_data}/ade20k')
    options += tuple(f'{x}_dataloader.num_workers=0' for x in ('train', 'val', 'test'))

    def call(name, checkpoint, *more):
        work_dir = ('--work-dir', tmp_path / 'wd')
        arguments = {
            'train': (config, '--resume', checkpoint, *work_dir, *options),
            'test': (config, checkpoint, *work_dir, *options),
            'demo_report': (config, checkpoint, *options),
            'infer': (
                *(config, checkpoint, tmp_path / 'picture.png'),
                *('--out', tmp_path / 'out'),
            ),
            'show_groups': (
                *(config, checkpoint, tmp_path / 'picture.png'),
                *('--out', tmp_path / 'out.png'),
            ),
            'demo_page': (config, checkpoint),
            'export_onnx': (
                *(config, checkpoint, '--out', tmp_path / 'x.onnx'),
                *('--shape', 32, 32),
            ),
        }[name]
        needed = dict(export_onnx='onnxscript', demo_page='gradio')
        if name in needed:
            pytest.importorskip(needed[name])
        call_tool(name, *arguments, *more)

    return call


TOOLS = (
    'train',
    'test',
    'demo_report',
    'infer',
    'show_groups',
    'demo_page',
    'export_onnx',
)


@pytest.mark.parametrize('name', TOOLS)
def test_no_tool_runs_code_of_a_checkpoint(tool, evil, name):
    file, mark = evil
    with pytest.raises(ValueError, match='more than plain data'):
        tool(name, file)
    assert not mark.exists()


@pytest.mark.parametrize('name', TOOLS)
@pytest.mark.parametrize('change', (without_a_tensor, with_nan))
def test_no_tool_takes_other_weights(tool, tiny_models, tmp_path, name, change):
    checkpoint = torch.load(tiny_models['mmseg'][1], weights_only=True)
    checkpoint['state_dict'] = change(checkpoint['state_dict'])
    checkpoint |= dict(optimizer={}, message_hub=dict(log_scalars={}))  # for --resume
    torch.save(checkpoint, tmp_path / 'changed.pth')
    with pytest.raises(ValueError, match=rf'changed\.pth .*{MISFITS[change]}'):
        tool(name, tmp_path / 'changed.pth')


@pytest.fixture
def segmentor(tiny_models):
    """The tiny segmentor with other weights, and those of its checkpoint."""
    config, file = tiny_models['mmseg']
    cfg = Config.fromfile(config)
    init_default_scope('mmseg')
    cfg.model.backbone.norm_cfg = dict(type='BN')
    for head in ('decode_head', 'auxiliary_head'):
        cfg.model[head].norm_cfg = dict(type='BN')
    model = MODELS.build(cfg.model)
    return model, checkpoints.read_weights(file)


@pytest.mark.parametrize('change', MISFITS)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(segmentor, change):
    model, state = segmentor
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf'^x\.pth .*{MISFITS[change]}.*--allow-p'):
        checkpoints.load_weights(model, 'x.pth', change(state))
    assert all(torch.equal(before[key], x) for key, x in model.state_dict().items())


@pytest.mark.parametrize('change', MISFITS)
def test_allow_partial_loads_what_fits(segmentor, change):
    model, state = segmentor
    before = model.state_dict()[KEY].clone()
    checkpoints.load_weights(model, 'x.pth', change(state), allow_partial=True)
    for key, x in model.state_dict().items():
        kept = key == KEY and change is not with_another_tensor
        assert torch.equal(x, before if kept else state[key]), key


def test_allow_partial_of_a_tool(tool, tiny_models, tmp_path):
    state = torch.load(tiny_models['mmseg'][1], weights_only=True)['state_dict']
    torch.save(without_a_tensor(state), tmp_path / 'partial.pth')
    tool('infer', tmp_path / 'partial.pth', '--allow-partial')
    assert (tmp_path / 'out/picture.png').is_file()


def test_damaged_files(tiny_models, tmp_path):
    with open(tiny_models['mmseg'][1], 'rb') as file:
        whole = file.read()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[:-100], bytes(flipped), b'', b'text', b'[1]'):
        (tmp_path / 'x.pth').write_bytes(content)
        with pytest.raises(ValueError, match=r'x\.pth is damaged, .*Copy it again'):
            checkpoints.read_checkpoint(tmp_path / 'x.pth')


def test_safetensors_of_an_address(tmp_path, monkeypatch):
    """mmengine gives what it downloads a name without an end."""
    safetensors = pytest.importorskip('safetensors.torch')
    safetensors.save_file({KEY: torch.arange(3.0)}, tmp_path / 'x.safetensors')
    monkeypatch.setenv('no_proxy', '*')
    folder = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f'http://127.0.0.1:{server.server_port}/x.safetensors'
            for file in (tmp_path / 'x.safetensors', address, f'{address}?download=1'):
                found = checkpoints.read_weights(str(file))
                assert torch.equal(found[KEY], torch.arange(3.0))
        finally:
            server.shutdown()
            thread.join()


def test_the_framework_reads_safely_too(evil, call_tool):
    """Whatever loads by mmengine in a tool: ``init_cfg`` of other modules, hooks."""
    from mmengine.runner import load_checkpoint

    checkpoints.secure_framework()
    file, mark = evil
    with pytest.raises(ValueError, match='more than plain data'):
        load_checkpoint(torch.nn.Linear(1, 1), str(file))
    assert not mark.exists()


def test_weights_alone_resume_no_training(tool, tiny_models):
    with pytest.raises(ValueError, match=r'has no message_hub, optimizer, so no tr'):
        tool('train', tiny_models['mmseg'][1])


def test_the_config_of_a_resumed_training_tests_weights_alone(
    tool, tiny_models, tmp_path
):
    """The Runner leaves it in the work dir."""
    tool('test', tiny_models['mmseg'][1], 'resume=True')
    assert (tmp_path / 'wd/metrics.json').is_file()


def test_an_old_checkpoint_resumes_if_trusted(tmp_path):
    """As mmengine writes them: the logged history as objects of its own."""
    old = dict(meta={}, message_hub=HistoryBuffer([1.0], [1]))
    torch.save(old, tmp_path / 'old.pth')
    with pytest.raises(ValueError, match=r'HistoryBuffer.*--trust'):
        checkpoints.read_checkpoint(tmp_path / 'old.pth')
    found = checkpoints.read_checkpoint(tmp_path / 'old.pth', trust=True)
    assert found['message_hub'].current() == 1.0


def test_weights_are_not_trusted_where_there_is_nothing_to_resume(
    tiny_models, demo_data, evil, call_tool, tmp_path
):
    file, mark = evil
    config, _ = tiny_models['mmseg']
    with pytest.raises(ValueError, match='more than plain data'):
        call_tool(
            'train',
            *(config, '--resume', '--trust', '--work-dir', tmp_path / 'wd'),
            *('--cfg-options', f'data_root={demo_data}/ade20k', f'load_from={file}'),
        )
    assert not mark.exists()


def test_trust_is_for_resuming(tool, tiny_models, call_tool, capsys):
    with pytest.raises(SystemExit):
        call_tool('train', tiny_models['mmseg'][0], '--trust')
    assert '--trust is for --resume' in capsys.readouterr().err
