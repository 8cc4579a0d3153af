"""Files are whole or not there, whatever interrupts their writing."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from mmdgt import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path):
    file = tmp_path / 'new' / 'x.png'
    with files.whole_file(file) as part:
        assert part.suffix == '.png' and part.parent == file.parent
        part.write_bytes(b'whole')
        assert not file.exists()
    assert file.read_bytes() == b'whole'
    assert names(file.parent) == ['x.png']


def test_it_is_on_the_disk_before_it_has_its_name_and_so_is_the_name(
    tmp_path, monkeypatch
):
    flushed, flush, opened = [], os.fsync, len(os.listdir('/proc/self/fd'))

    def record(descriptor):
        at = os.readlink(f'/proc/self/fd/{descriptor}')
        flushed.append((os.path.basename(at)[: len(files.PART)], names(tmp_path)))
        flush(descriptor)

    monkeypatch.setattr(os, 'fsync', record)
    files.write_text(tmp_path / 'x', 'text')
    (first, before), (second, after) = flushed
    assert first == files.PART and 'x' not in before
    assert second == tmp_path.name[: len(files.PART)] and after == ['x']
    assert len(os.listdir('/proc/self/fd')) == opened


def test_it_has_the_rights_of_any_new_file(tmp_path):
    (tmp_path / 'usual').write_text('')
    files.write_text(tmp_path / 'x', '')
    assert (tmp_path / 'x').stat().st_mode == (tmp_path / 'usual').stat().st_mode


def test_an_error_leaves_what_was_there(tmp_path):
    files.write_json(tmp_path / 'x.json', [1])
    with pytest.raises(ZeroDivisionError), files.whole_file(tmp_path / 'x.json') as x:
        x.write_text('[1, 2')
        _ = 1 / 0
    with pytest.raises(TypeError):
        files.write_json(tmp_path / 'x.json', [object()])
    assert json.loads((tmp_path / 'x.json').read_text()) == [1]
    assert names(tmp_path) == ['x.json']


def test_a_full_disk_is_an_error_and_leaves_what_was_there(tmp_path):
    files.write_text(tmp_path / 'x', 'old')
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError):
            files.write_bytes(tmp_path / 'x', bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / 'x').read_text() == 'old'
    assert names(tmp_path) == ['x']


def test_a_kill_leaves_what_was_there(tmp_path):
    files.write_text(tmp_path / 'x', 'old')
    code = f"""
import os
from mmdgt.files import whole_file
with whole_file({str(tmp_path / 'x')!r}) as part:
    part.write_text('half')
    os.kill(os.getpid(), {signal.SIGKILL})
"""
    assert subprocess.run([sys.executable, '-c', code]).returncode == -signal.SIGKILL
    assert (tmp_path / 'x').read_text() == 'old'
    rest = [name for name in names(tmp_path) if name != 'x']
    assert len(rest) == 1 and rest[0].startswith(files.PART)


def test_a_writer_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), files.whole_file(tmp_path / 'x'):
        pass


@pytest.mark.parametrize('name', ['.', os.devnull])
def test_folders_and_devices_are_not_replaced(tmp_path, name):
    with pytest.raises(OSError, match='expected a file to write'):
        files.write_text(tmp_path / name, 'text')
