"""The bounds of the page in public, against a server that only counts."""

import asyncio
import os

import pytest


@pytest.fixture
def limits(tools):
    return tools('page_limits')


@pytest.fixture
def ask(limits, tmp_path):
    """Send a request: the status of the answer, and the bytes that came through."""
    passed = []

    async def application(scope, receive, send):
        size = 0
        while scope['method'] == 'POST':
            message = await receive()
            if message['type'] == 'http.disconnect':
                passed.append('gave up')
                return
            size += len(message['body'])
            if not message.get('more_body'):
                break
        passed.append(size)
        await send({'type': 'http.response.start', 'status': 200, 'headers': []})
        await send({'type': 'http.response.body', 'body': b''})

    bound = limits.Limits(application, tmp_path)

    def call(path, parts=(b'',), method='POST', header=None, client='10.0.0.1'):
        sizes = [header] if header is not None else []
        scope = dict(
            type='http',
            method=method,
            path=path,
            headers=[(b'content-length', str(size).encode()) for size in sizes],
            client=(client, 1),
        )
        messages = [
            dict(type='http.request', body=part, more_body=i < len(parts) - 1)
            for i, part in enumerate(parts)
        ]
        sent = []

        async def receive():
            return messages.pop(0) if messages else await asyncio.sleep(9)

        async def send(message):
            sent.append(message)

        passed.clear()
        asyncio.run(bound(scope, receive, send))
        call.unread = len(messages)
        return sent[0]['status'] if sent else None, list(passed)

    call.limits = bound
    return call


UPLOAD = '/gradio_api/upload'


def test_bodies_are_bounded(limits, ask):
    most = limits.POSTS[UPLOAD]
    assert ask(UPLOAD, [b'x' * 1000], header=1000) == (200, [1000])
    assert ask(UPLOAD, header=most) == (200, [0])
    assert ask(UPLOAD, header=most + 1) == (413, [])
    assert ask(UPLOAD, header='-1') == (413, [])
    # It is heard out, up to a bound, for its sender to hear the answer.
    part = bytes(limits.MAX_BYTES)
    assert ask(UPLOAD, [part] * 3, header=3 * len(part)) == (413, [])
    assert ask.unread == 0
    assert ask(UPLOAD, [part] * 9, header=9 * len(part)) == (413, [])
    assert ask.unread == 4
    # Without a header, or with one that lies.
    half = bytes(most // 2)
    assert ask(UPLOAD, [half, half]) == (200, [2 * len(half)])
    assert ask(UPLOAD, [half, half, b'xx'], header=5) == (None, ['gave up'])
    assert ask('/gradio_api/queue/join', header=limits.FORM_BYTES + 1) == (413, [])


def test_a_slow_body_is_given_up(limits, ask, monkeypatch):
    monkeypatch.setattr(limits, 'MINUTE', 0.05)

    async def dawdle():
        await asyncio.sleep(9)

    receive = limits.bounded(dawdle, 100)
    assert asyncio.run(receive()) == {'type': 'http.disconnect'}


@pytest.mark.parametrize(
    'path', ['/gradio_api/process_recording', '/gradio_api/run/predict', '/']
)
def test_other_posts_are_refused(ask, path):
    assert ask(path) == (404, [])
    assert ask(path, method='PUT') == (404, [])
    assert ask(path, method='GET') == (200, [0])


def test_the_rate_of_an_address_is_bounded(limits, ask, monkeypatch):
    times = iter(range(10**6))
    monkeypatch.setattr(limits.time, 'monotonic', lambda: next(times) * 0.01)
    assert {ask(UPLOAD)[0] for _ in range(limits.RATE)} == {200}
    assert ask(UPLOAD) == (429, [])
    assert ask('/', method='GET')[0] == 200
    assert ask(UPLOAD, client='10.0.0.2')[0] == 200
    for _ in range(int(limits.MINUTE / 0.01)):
        next(times)
    assert ask(UPLOAD)[0] == 200


def test_addresses_are_forgotten(limits, ask, monkeypatch):
    monkeypatch.setattr(limits, 'MAX_ADDRESSES', 3)
    for i in range(5):
        ask(UPLOAD, client=f'10.0.0.{i}')
    assert list(ask.limits.recent) == ['10.0.0.2', '10.0.0.3', '10.0.0.4']


def test_connections_are_bounded(limits, ask, monkeypatch):
    monkeypatch.setattr(limits, 'MAX_OPEN', 2)
    ask.limits.open = 1
    assert ask('/', method='GET')[0] == 200
    assert ask.limits.open == 1  # and it is closed again
    ask.limits.open = 2
    assert ask('/', method='GET') == (503, [])


def test_temporary_files_are_bounded(limits, ask, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, 'MAX_STORED', 100)
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'upload.png').write_bytes(bytes(60))
    (tmp_path / 'other.png').write_bytes(bytes(40))
    assert ask(UPLOAD)[0] == 200
    (tmp_path / 'third.png').write_bytes(bytes(1))
    assert ask(UPLOAD) == (503, [])
    assert ask('/gradio_api/queue/join')[0] == 200


def test_temporary_files_go(limits, tmp_path):
    folder = tmp_path / 'folder'
    folder.mkdir()
    (folder / 'upload.png').touch()
    changed = os.stat(folder / 'upload.png').st_ctime
    limits.sweep(tmp_path, changed + limits.KEPT - 1)
    assert (folder / 'upload.png').exists()
    limits.sweep(tmp_path, changed + limits.KEPT + 1)
    assert not (folder / 'upload.png').exists()
