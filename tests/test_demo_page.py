"""The page in the browser: what it refuses, computes and serves."""

import importlib
import socket
from functools import partialmethod

import cv2
import numpy as np
import pytest
from conftest import REPOSITORY, free_port
from mmengine.config import Config

from mmdgt.engine.inference import Predictor


@pytest.fixture
def demo_page(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / 'tools'))
    return importlib.import_module('demo_page')


@pytest.fixture
def page(tiny_models, demo_page):
    config, checkpoint = tiny_models['mmseg']
    return demo_page.Page(Predictor(Config.fromfile(config), checkpoint, 'cpu'))


@pytest.fixture
def scene(tmp_path):
    file = tmp_path / 'scene.png'
    rng = np.random.default_rng(0)
    cv2.imwrite(str(file), rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    return str(file)


def test_what_is_refused(demo_page, tmp_path):
    (tmp_path / 'text.png').write_text('text')
    with pytest.raises(ValueError, match=r'Expected a picture .*, got text\.png'):
        demo_page.read_upload(str(tmp_path / 'text.png'))
    blank = np.zeros((2049, 2048, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'large.png'), blank)
    with pytest.raises(ValueError, match=r'at most 4.2 million pixels, got 2048x2049'):
        demo_page.read_upload(str(tmp_path / 'large.png'))
    cv2.imwrite(str(tmp_path / 'fits.png'), blank[1:])
    assert demo_page.read_upload(str(tmp_path / 'fits.png')).shape == (2048, 2048, 3)


def test_a_click_shows_the_group_of_the_pixel(page, demo_page, scene, monkeypatch):
    """The network sees the picture at half its size."""
    prepare = page.predictor.prepare
    page.predictor.prepare = lambda image: prepare(image[::2, ::2].copy())
    picked = []
    monkeypatch.setattr(demo_page, 'figure', lambda *args: picked.append(args))
    page.show(scene, 2, 1, 2, 69, 3)
    ((view, groups, pixels, others),) = picked
    assert view.shape == (25, 35, 3)
    assert (groups.stride, groups.group.shape) == (8, (4, 5))
    assert (pixels, others) == ([(34, 1)], [])


def test_the_page_is_served_on_this_machine_alone(
    tiny_models, page, scene, call_tool, monkeypatch
):
    gradio = pytest.importorskip('gradio')
    client = pytest.importorskip('gradio_client')
    launch, port = gradio.Blocks.launch, free_port()
    monkeypatch.setattr(
        gradio.Blocks, 'launch', partialmethod(launch, prevent_thread_lock=True)
    )
    call_tool('demo_page', *tiny_models['mmseg'], '--port', port)
    try:
        found = client.Client(f'http://127.0.0.1:{port}', verbose=False).predict(
            client.handle_file(scene), api_name='/predict'
        )
        drawn = page.predictor.draw(cv2.imread(scene))
        np.testing.assert_array_equal(cv2.imread(found), drawn)
        # Another address of the machine, as good as any of the network.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(('127.0.0.2', port), timeout=5)
    finally:
        gradio.close_all()


def test_no_page_for_a_classifier(tiny_models, call_tool, capsys):
    with pytest.raises(SystemExit):
        call_tool('demo_page', *tiny_models['mmpretrain'])
    assert 'for segmentors and detectors' in capsys.readouterr().err
