"""What bounds a page that anybody may reach: requests, bytes, files, connections.

The standard library alone; nothing here knows of models.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

MAX_BYTES = 20 * 2**20  # of an uploaded file
# What Gradio's front end and client post, the bytes of each; nothing else is let in.
FORM_BYTES = 2**16  # of a form around the file, or of JSON
POSTS = {
    '/gradio_api/upload': MAX_BYTES + FORM_BYTES,
    '/gradio_api/queue/join': FORM_BYTES,
    '/gradio_api/cancel': FORM_BYTES,
    '/gradio_api/reset': FORM_BYTES,
    '/login': FORM_BYTES,
}
RATE = 60  # posts of a visitor's address in a minute; a picture takes two
MINUTE = 60.0  # seconds, of the rate and for a body to arrive
MAX_OPEN = 400  # connections; a visitor holds three at most
MAX_STORED = 2**30  # bytes of all temporary files
KEPT = 600  # seconds that a temporary file stays
MAX_ADDRESSES = 10_000  # that are remembered

Send = Callable[[dict], Awaitable[None]]
Receive = Callable[[], Awaitable[dict]]


class Refusal(NamedTuple):
    """What a visitor who is turned away is told."""

    status: int
    text: str


class Limits:
    """ASGI middleware that turns away what exceeds the bounds of this file.

    Args:
        app (Callable): The ASGI application behind it.
        folder (Path): Where that keeps temporary files.
    """

    def __init__(self, app: Callable, folder: Path) -> None:
        self.app = app
        self.folder = folder
        self.open = 0
        self.recent: dict[str, deque[float]] = {}  # address to times of its posts

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with why it is refused."""
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        if refusal := self.refuse(scope):
            if refusal.status == 413:  # or they'd see a broken connection, no answer
                receive = bounded(receive, 4 * MAX_BYTES)
                while (await receive()).get('more_body'):
                    pass
            return await answer(send, refusal)
        if scope['method'] == 'POST':
            receive = bounded(receive, POSTS[scope['path'].rstrip('/')])
        self.open += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.open -= 1

    def refuse(self, scope: dict) -> Refusal | None:
        """Why a request is turned away before its body is read; None if it isn't."""
        if self.open >= MAX_OPEN:
            return Refusal(503, 'Too many visitors at once: come back later.')
        if scope['method'] in ('GET', 'HEAD'):
            return None
        most = POSTS.get(scope['path'].rstrip('/'))
        if scope['method'] != 'POST' or most is None:
            return Refusal(404, 'There is nothing to post to here.')
        size = dict(scope['headers']).get(b'content-length', b'0')
        if not size.isdigit() or int(size) > most:
            return Refusal(413, f'Expected at most {most / 2**20:.1f} MiB.')
        address = (scope.get('client') or ('', 0))[0]
        if self.too_often(address, time.monotonic()):
            return Refusal(429, f'Expected at most {RATE} requests in a minute.')
        full = sum(size for _, size, _ in stored(self.folder)) > MAX_STORED
        if full and 'upload' in scope['path']:
            return Refusal(503, 'The page keeps too many files: come back later.')
        return None

    def too_often(self, address: str, now: float) -> bool:
        """Count a post; whether the address has made too many in the last minute."""
        times = self.recent.pop(address, deque(maxlen=RATE))
        self.recent[address] = times  # the latest address is the last
        if len(self.recent) > MAX_ADDRESSES:
            del self.recent[next(iter(self.recent))]
        if len(times) == RATE and now - times[0] < MINUTE:
            return True
        times.append(now)
        return False


def bounded(receive: Receive, most: int) -> Receive:
    """Give up on a body that has more bytes than its header said, or is too slow."""
    left, deadline, complete = most, time.monotonic() + MINUTE, False

    async def next_part() -> dict[str, Any]:
        nonlocal left, complete
        if complete:  # now the application waits for the visitor to leave
            return await receive()
        try:
            wait = max(deadline - time.monotonic(), 0)
            message = await asyncio.wait_for(receive(), wait)
        except asyncio.TimeoutError:
            return {'type': 'http.disconnect'}
        left -= len(message.get('body', b''))
        complete = not message.get('more_body', False)
        return message if left >= 0 else {'type': 'http.disconnect'}

    return next_part


async def answer(send: Send, refusal: Refusal) -> None:
    """Send a refusal as plain text."""
    headers = [
        (b'content-type', b'text/plain; charset=utf-8'),
        (b'connection', b'close'),
        (b'retry-after', str(math.ceil(MINUTE)).encode()),
    ]
    start = {'type': 'http.response.start', 'status': refusal.status}
    await send(start | {'headers': headers})
    await send({'type': 'http.response.body', 'body': refusal.text.encode()})


def stored(folder: Path) -> list[tuple[Path, int, float]]:
    """The files below a folder, with their bytes and the time of their last change."""
    found = []
    for file in folder.rglob('*'):
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            if file.is_file():
                found.append((file, file.stat().st_size, file.stat().st_ctime))
    return found


def sweep(folder: Path, now: float) -> None:
    """Delete the files that have not changed for as long as files are kept."""
    for file, _, changed in stored(folder):
        if now - changed > KEPT:
            file.unlink(missing_ok=True)


def sweep_forever(folder: Path) -> None:
    """Delete old files every minute, also those that a broken-off upload left."""
    while True:
        sweep(folder, time.time())
        time.sleep(MINUTE)
