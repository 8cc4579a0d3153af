"""The notebook of docs/: run as its reader runs it, and as it is kept."""

import base64
import json
import re
import subprocess

import cv2
import numpy as np
import pytest
from conftest import REPOSITORY

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')

NOTEBOOK = REPOSITORY / 'docs/tutorial.ipynb'


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get('outputs', ())]


def pictures(notebook):
    """What is shown, (H, W, 3) each."""
    data = (output.get('data', {}).get('image/jpeg') for output in outputs(notebook))
    encoded = (np.frombuffer(base64.b64decode(x), np.uint8) for x in data if x)
    return [cv2.imdecode(x, cv2.IMREAD_COLOR) for x in encoded]


def score_of_background(folder):
    """The mIoU in percent of taking every pixel for background, the first class."""
    maps = [cv2.imread(str(file), cv2.IMREAD_UNCHANGED) for file in folder.iterdir()]
    labels = np.stack(maps)
    return 100 * (labels == 1).sum() / (labels > 0).sum() / 7


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """A folder in which the notebook has been run, and the notebook."""
    folder = tmp_path_factory.mktemp('checkout')
    for name in ('configs', 'tools'):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / 'docs').mkdir()
    notebook = read()
    resources = dict(metadata=dict(path=str(folder / 'docs')))
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    return folder, notebook


def test_the_model_has_learnt(checkout):
    folder, notebook = checkout
    metrics = json.loads((folder / 'work_dirs/tutorial/metrics.json').read_text())
    labels = folder / 'data/tutorial/ade20k/annotations/validation'
    assert metrics['mIoU'] > 3 * score_of_background(labels)
    (shown,) = (o for o in outputs(notebook) if 'mIoU' in str(o.get('data')))
    assert f"'mIoU': {round(metrics['mIoU'], 2)}" in shown['data']['text/plain']


def test_the_notebook_is_kept_with_what_it_shows(checkout):
    """Scenes of 128 pixels, doubled; picture and prediction; groups, queries, keys."""
    _, notebook = checkout
    sizes = [(256, 4 * 256, 3), (256, 2 * 256, 3), (256, 3 * 256, 3)]
    for version in (notebook, read()):
        assert [picture.shape for picture in pictures(version)] == sizes
        _, prediction, groups = pictures(version)
        picture, drawn = np.hsplit(prediction, 2)
        assert np.abs(picture.astype(float) - drawn).mean() > 10
        everything, queries, keys = np.hsplit(groups, 3)
        assert everything.mean() > 1.5 * max(queries.mean(), keys.mean())


def first_cell(folder, repository):
    """Run the first cell, told the address of a repository, in a folder."""
    notebook = read()
    cell = next(cell for cell in notebook.cells if cell.cell_type == 'code')
    cell.source = cell.source.replace(
        "REPOSITORY = ''", f'REPOSITORY = {str(repository)!r}'
    )
    notebook.cells = [cell]
    resources = dict(metadata=dict(path=str(folder)))
    nbclient.NotebookClient(notebook, timeout=60, resources=resources).execute()


def test_without_a_checkout_the_notebook_makes_one(tmp_path, monkeypatch):
    """With a pip that only writes down what it is asked for, and where."""
    with pytest.raises(nbclient.exceptions.CellExecutionError, match='set REPOSITORY'):
        first_cell(tmp_path, '')
    fake = tmp_path / 'fake/pip/__main__.py'
    fake.parent.mkdir(parents=True)
    (fake.parent / '__init__.py').touch()
    fake.write_text(
        'import os, sys\n'
        'asked = os.environ["MMCV_WITH_OPS"], os.path.isdir("configs"), sys.argv[1:]\n'
        f'print(*asked, file=open({str(tmp_path / "calls.txt")!r}, "a"))\n'
    )
    monkeypatch.setenv('PYTHONPATH', str(fake.parents[1]))
    repository = tmp_path / 'repository'
    (repository / 'configs').mkdir(parents=True)
    (repository / 'configs/some.py').touch()
    author = ['-c', 'user.name=A', '-c', 'user.email=a@example.org']
    for command in (['init'], ['add', '.'], [*author, 'commit', '-m', 'Start']):
        subprocess.run(['git', *command], cwd=repository, check=True)
    folder = tmp_path / 'empty'
    folder.mkdir()
    first_cell(folder, repository)
    assert (folder / 'checkout/configs/some.py').is_file()
    calls = (tmp_path / 'calls.txt').read_text().splitlines()
    assert all(call.startswith('0 True [') for call in calls)
    assert 'onedl-mmcv' in calls[-2] and "'--editable', '.[seg]'" in calls[-1]


def test_the_notebook_is_small_and_names_no_machine():
    text = NOTEBOOK.read_text()
    assert len(text) < 400_000
    assert not any('execution' in cell.metadata for cell in read().cells)
    assert not re.search(r'/(home|root|tmp|usr|Users)/', text)


def test_the_notebook_links_to_what_is_there():
    texts = (cell.source for cell in read().cells if cell.cell_type == 'markdown')
    links = re.findall(r'\]\(([^):]+)\)', '\n'.join(texts))
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)
