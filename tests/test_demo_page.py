"""The page in the browser: what it refuses, computes and serves."""

import importlib
import os
import re
import shutil
import socket
import tempfile
import urllib.error
import urllib.request
from functools import partialmethod

import cv2
import numpy as np
import pytest
from conftest import REPOSITORY, free_port
from mmengine.config import Config

from mmdgt.openmmlab.apis.inference import Predictor


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


def save(file, height, width):
    cv2.imwrite(str(file), np.zeros((height, width, 3), np.uint8))
    return str(file)


def test_what_is_refused(demo_page, tmp_path):
    (tmp_path / 'text.png').write_text('text')
    with pytest.raises(ValueError, match=r'Expected a picture .*, got text\.png$'):
        demo_page.read_upload(str(tmp_path / 'text.png'))
    # Ghostscript would run this.
    (tmp_path / 'program.png').write_text(
        '%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n'
    )
    with pytest.raises(ValueError, match=r'Expected a picture .*, got program\.png$'):
        demo_page.read_upload(str(tmp_path / 'program.png'))
    large = save(tmp_path / 'large.png', 5001, 5000)
    with pytest.raises(ValueError, match=r'at most 25 million pixels, got 5000x5001'):
        demo_page.read_upload(large)


@pytest.mark.parametrize(
    ('size', 'shown'),
    [
        ((5000, 5000), (1024, 1024)),
        ((600, 2048), (300, 1024)),
        ((1024, 1024), (1024, 1024)),
        ((20, 30), (20, 30)),
        ((9000, 2), (1024, 1)),
    ],
)
def test_large_pictures_are_shrunk(demo_page, tmp_path, size, shown):
    found = demo_page.read_upload(save(tmp_path / 'picture.png', *size))
    assert found.shape == (*shown, 3)


def test_errors_name_no_folder(demo_page, tmp_path):
    content = cv2.imencode('.png', np.zeros((40, 40, 3), np.uint8))[1].tobytes()
    (tmp_path / 'torn.png').write_bytes(content[:60])
    with pytest.raises(ValueError, match=r'^torn\.png is damaged') as raised:
        demo_page.read_upload(str(tmp_path / 'torn.png'))
    assert str(tmp_path) not in str(raised.value)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ((), r'0\.0\.0\.0 is reached from other machines.*--auth.*--no-auth'),
        (('--auth',), 'needs MMDGT_PAGE_AUTH=USER:PASSWORD'),
        (('--auth', '--no-auth'), 'not allowed with argument --auth'),
    ],
)
def test_a_public_page_needs_a_decision(
    tiny_models, call_tool, capsys, options, message
):
    with pytest.raises(SystemExit):
        call_tool('demo_page', *tiny_models['mmseg'], '--host', '0.0.0.0', *options)
    assert re.search(message, capsys.readouterr().err)


def test_a_page_with_a_password(tiny_models, call_tool, monkeypatch):
    gradio = pytest.importorskip('gradio')
    given = {}
    monkeypatch.setattr(
        gradio.Blocks, 'launch', lambda self, **settings: given.update(settings)
    )
    monkeypatch.setenv('MMDGT_PAGE_AUTH', 'me:se:cret')
    public = ('--host', '0.0.0.0', '--auth')
    call_tool('demo_page', *tiny_models['mmseg'], *public)
    assert given['auth'] == ('me', 'se:cret')


def test_a_click_shows_the_group_of_the_pixel(page, demo_page, scene, monkeypatch):
    """The network sees the picture at half its size."""
    cv2.imwrite(scene, np.tile(cv2.imread(scene), (2, 2, 1)))
    prepare = page.predictor.prepare
    page.predictor.prepare = lambda image: prepare(image[::2, ::2].copy())
    picked = []
    monkeypatch.setattr(demo_page, 'group_panels', lambda *args: picked.append(args))
    page.show(scene, 2, 1, 2, 69, 3)
    ((view, groups, pixels, others),) = picked
    assert view.shape == (50, 70, 3)
    assert (groups.stride, groups.group.shape) == (8, (7, 9))
    assert (pixels, others) == ([(34, 1)], [])


@pytest.fixture
def url(tiny_models, call_tool, monkeypatch):
    """Where the page is served, by the command."""
    gradio = pytest.importorskip('gradio')
    launch, port = gradio.Blocks.launch, free_port()
    monkeypatch.setattr(
        gradio.Blocks, 'launch', partialmethod(launch, prevent_thread_lock=True)
    )
    # The server would close the log files that other tests of this process write to.
    monkeypatch.setattr('logging.config.dictConfig', lambda config: None)
    call_tool('demo_page', *tiny_models['mmseg'], '--port', port)
    yield f'http://127.0.0.1:{port}'
    gradio.close_all()


def test_the_page_is_served_on_this_machine_alone(url, page, scene):
    client = pytest.importorskip('gradio_client')
    found = client.Client(url, verbose=False).predict(
        client.handle_file(scene), api_name='/predict'
    )
    drawn = page.predictor.draw(cv2.imread(scene))
    np.testing.assert_array_equal(cv2.imread(found), drawn)
    # Another address of the machine, as good as any of the network.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(('127.0.0.2', int(url.split(':')[-1])), timeout=5)


@pytest.fixture
def client(url):
    return pytest.importorskip('gradio_client').Client(url, verbose=False)


def test_an_error_of_ours_is_told_and_others_are_not(
    client, page, tmp_path, scene, monkeypatch
):
    handle = pytest.importorskip('gradio_client').handle_file
    (tmp_path / 'text.png').write_text('text')
    with pytest.raises(Exception, match=r'Expected a picture .*got text\.png') as told:
        client.predict(handle(tmp_path / 'text.png'), api_name='/predict')
    assert 'mmdgt-page' not in str(told.value)

    def fail(self, image):
        raise RuntimeError(f'in {tmp_path}/secret.py')

    monkeypatch.setattr(Predictor, 'draw', fail)
    with pytest.raises(Exception, match='could not be served') as told:
        client.predict(handle(scene), api_name='/predict')
    assert 'secret' not in str(told.value) and str(tmp_path) not in str(told.value)


def test_only_what_was_uploaded_is_served(client):
    """No file of the machine and no address, and the answer names no folder."""

    def told(path):
        file = dict(path=path, meta={'_type': 'gradio.FileData'})
        with pytest.raises(Exception) as raised:
            client.predict(file, api_name='/predict')
        return str(raised.value)

    assert 'got the address of one' in told('http://127.0.0.1:1/x.png')
    for folder in ('/etc', os.getcwd(), tempfile.gettempdir()):
        assert folder not in told('/etc/passwd')


@pytest.mark.parametrize('path', ['process_recording', 'run/predict', 'vibe-edit'])
def test_nothing_else_is_posted_to(url, path):
    request = urllib.request.Request(f'{url}/gradio_api/{path}', b'{}', method='POST')
    with pytest.raises(urllib.error.HTTPError, match='404'):
        urllib.request.urlopen(request)


class Browser:
    """A headless Chromium, and what a user does in it."""

    def __init__(self, url):
        webdriver = pytest.importorskip('selenium.webdriver')
        driver = shutil.which('chromedriver')
        names = ('chromium', 'chromium-browser', 'google-chrome')
        browser = next(filter(None, map(shutil.which, names)), None)
        if not (driver and browser):
            pytest.skip('needs a Chromium and its chromedriver on the PATH')
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        options.page_load_strategy = 'eager'  # waits for nothing from the network
        for switch in ('headless=new', 'no-sandbox', 'disable-dev-shm-usage'):
            options.add_argument(f'--{switch}')
        self.url = url
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(driver))

    def wait(self, condition):
        """Wait until a condition of the driver holds; returns what it returns."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        redrawn = (StaleElementReferenceException,)
        return WebDriverWait(self.driver, 30, ignored_exceptions=redrawn).until(
            condition
        )

    def upload(self, file):
        """Load the page anew and choose a file."""
        self.driver.get(self.url)
        (entry,) = self.wait(
            lambda d: d.find_elements('css selector', 'input[type=file]')
        )
        entry.send_keys(str(file))

    def pictures(self, count):
        """Wait for that many pictures that the page has computed."""

        def loaded(driver):
            found = driver.find_elements('css selector', 'img[src*="/file="]')
            whole = [x for x in found if x.get_property('naturalWidth')]
            return whole if len(whole) == count else False

        return self.wait(loaded)

    def says(self, text):
        """Wait for a text anywhere on the page."""
        return self.wait(lambda d: text in d.find_element('tag name', 'body').text)


@pytest.fixture
def browser(url):
    browser = Browser(url)
    yield browser
    browser.driver.quit()


def download(element):
    """The pixels of a picture of the page, (H, W, 3) RGB."""
    with urllib.request.urlopen(element.get_property('src')) as response:
        data = np.frombuffer(response.read(), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]


def test_a_picture_and_a_click_in_the_browser(browser, page, scene):
    browser.upload(scene)
    (found,) = browser.pictures(1)
    np.testing.assert_array_equal(download(found), page.predict(scene))
    found.click()  # in the middle, up to rounding
    figure = download(browser.pictures(2)[1])
    around = [(x, y) for x in (34, 35, 36) for y in (24, 25, 26)]
    assert any(np.array_equal(figure, page.show(scene, 1, 1, 1, *p)) for p in around)


def test_the_browser_says_what_is_refused(browser, demo_page, tmp_path):
    (tmp_path / 'text.png').write_text('text')
    browser.upload(tmp_path / 'text.png')
    assert browser.says('Expected a picture (JPEG, PNG, WEBP, BMP), got text.png')
    browser.upload(save(tmp_path / 'large.png', 5001, 5000))
    assert browser.says('at most 25 million pixels, got 5000x5001. Make it smaller.')
    with open(tmp_path / 'heavy.png', 'wb') as file:
        file.truncate(demo_page.MAX_BYTES + 1)
    browser.upload(tmp_path / 'heavy.png')
    assert browser.says('exceed the maximum allowed size of 20.0 Mb: "heavy.png"')


def test_no_page_for_a_classifier(tiny_models, call_tool, capsys):
    with pytest.raises(SystemExit):
        call_tool('demo_page', *tiny_models['mmpretrain'])
    assert 'for segmentors and detectors' in capsys.readouterr().err
