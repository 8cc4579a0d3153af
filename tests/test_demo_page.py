"""The page in the browser: what it refuses, computes and serves."""

import importlib
import shutil
import socket
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
    assert browser.says('Expected a picture such as JPEG or PNG, got text.png')
    cv2.imwrite(str(tmp_path / 'large.png'), np.zeros((2049, 2048, 3), np.uint8))
    browser.upload(tmp_path / 'large.png')
    assert browser.says('at most 4.2 million pixels, got 2048x2049. Make it smaller.')
    with open(tmp_path / 'heavy.png', 'wb') as file:
        file.truncate(demo_page.MAX_BYTES + 1)
    browser.upload(tmp_path / 'heavy.png')
    assert browser.says('exceed the maximum allowed size of 20.0 Mb: "heavy.png"')


def test_no_page_for_a_classifier(tiny_models, call_tool, capsys):
    with pytest.raises(SystemExit):
        call_tool('demo_page', *tiny_models['mmpretrain'])
    assert 'for segmentors and detectors' in capsys.readouterr().err
