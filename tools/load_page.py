"""Visit the page as a crowd does, hostile visitors among it, and count what comes back.

``python tools/load_page.py CONFIG`` serves random weights with tools/demo_page.py and
sends visitors that upload pictures over HTTP by Gradio's client. Each has an address of
its own, as behind a proxy. A request is served, refused for the reason that it has to
be, asked to come back later, or lost: all that is anything else.
"""

import argparse
import json
import os
import random
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import gradio_client
import numpy as np
import torch
from measure import add_out, find_out, machine, save
from mmengine.config import Config

from mmdgt.commands import run_command
from mmdgt.openmmlab.apis.inference import Predictor

SHARE = 0.3  # of hostile requests
PAUSE = 10.0  # seconds between the requests of a visitor, on average
PATIENCE = 180.0  # seconds until a request is given up
LATER = 'Queue is full|Too many visitors|requests in a minute|come back later'
SIZES = (
    (64, 64),
    (480, 640),
    (1080, 1920),
    (3000, 4000),
)  # of pictures that are served


class Request(NamedTuple):
    """What a visitor sends, and the answer that it has to get.

    Attributes:
        name: Of the kind.
        file: To upload; or what the visitor claims to have uploaded, if it is a text.
        answer: The size (H, W) of the picture that is served, or what the refusal says.
    """

    name: str
    file: Path | str
    answer: tuple[int, int] | str


def draw_requests(folder: Path, rng: np.random.Generator) -> tuple[list, list]:
    """Make the files of harmless and of hostile requests."""
    harmless = []
    for height, width in SIZES:
        small = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        picture = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
        file = folder / f'{width}x{height}.jpg'
        cv2.imwrite(str(file), picture)
        factor = min(1, 1024 / max(height, width))
        size = (round(height * factor), round(width * factor))
        harmless.append(Request(f'{width}x{height}', file, size))
    whole = cv2.imencode('.png', picture[:400, :400])[1].tobytes()
    files = {
        'text': (b'text', 'Expected a picture'),
        'torn': (whole[: len(whole) // 2], 'is damaged'),
        'bomb': (bomb(30_000), 'Expected a picture|million pixels'),
        'program': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'a picture'),
        'thin': (cv2.imencode('.png', picture[:1])[1].tobytes(), 'smaller|at least'),
        'heavy': (bytes(21 * 2**20), 'HTTP Error 413'),
    }
    hostile = []
    for name, (content, answer) in files.items():
        (folder / f'{name}.png').write_bytes(content)
        hostile.append(Request(name, folder / f'{name}.png', answer))
    hostile.append(Request('address', 'http://127.0.0.1/x.png', 'an uploaded picture'))
    hostile.append(Request('path', '/etc/passwd', '^refused without a reason$'))
    return harmless, hostile


def bomb(side: int) -> bytes:
    """A black PNG of few bytes and many pixels, of one bit each."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4, 'big')
        return len(data).to_bytes(4, 'big') + kind + data + check

    header = side.to_bytes(4, 'big') * 2 + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes((side + 7) // 8 + 1) * side, 9)
    parts = chunk(b'IHDR', header) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + parts


class Crowd:
    """The visitors of a page, and what they saw.

    Args:
        url (str): Of the page.
        private (list[str]): What no answer may name.
        requests (tuple[list, list]): Harmless and hostile ones.
    """

    def __init__(self, url: str, private: list[str], requests: tuple) -> None:
        self.url, self.private = url, private
        self.harmless, self.hostile = requests
        self.counts: Counter = Counter()
        self.latencies: list[float] = []
        self.odd: list[str] = []
        self.lock = threading.Lock()

    def visit(self, number: int, until: float, downloads: Path) -> None:
        """Send requests until a time, with pauses."""
        rng = random.Random(number)
        time.sleep(rng.uniform(0, PAUSE))
        address = f'10.0.{number // 250}.{number % 250 + 1}'
        client = connect(self.url, downloads / str(number), address)
        while time.monotonic() < until:
            kinds = self.hostile if rng.random() < SHARE else self.harmless
            self.send(client, rng.choice(kinds))
            time.sleep(rng.uniform(0, 2 * PAUSE))

    def send(self, client: gradio_client.Client, request: Request) -> None:
        """Send one request and judge its answer."""
        start = time.monotonic()
        try:
            if request.name == 'heavy':  # which Gradio's client would not send
                content = Path(request.file).read_bytes()
                post(f'{self.url}/gradio_api/upload', content)
            if request.name in ('address', 'path'):
                found = claim(self.url, str(request.file))
            else:
                file = gradio_client.handle_file(request.file)
                job = client.submit(file, api_name='/predict')
                picture = cv2.imread(job.result(PATIENCE))
                found = 'no picture' if picture is None else picture.shape[:2]
        except Exception as error:
            found = f'{type(error).__name__}: {error}'
        spent = time.monotonic() - start
        with self.lock:
            self.judge(request, found, spent)

    def judge(self, request: Request, found: tuple | str, spent: float) -> None:
        """Count an answer."""
        if isinstance(found, str) and any(text in found for text in self.private):
            self.counts['named a folder'] += 1
            self.odd.append(f'{request.name}: {found}')
        if found == request.answer:
            self.counts['served'] += 1
            self.latencies.append(spent)
        elif isinstance(found, str) and re.search(LATER, found):
            self.counts['asked to come back later'] += 1
        elif (
            isinstance(found, str)
            and isinstance(request.answer, str)
            and re.search(request.answer, found)
        ):
            self.counts['refused by name'] += 1
        else:
            self.counts['lost'] += 1
            self.odd.append(f'{request.name}: {found}')


def post(url: str, body: bytes, kind: str = 'multipart/form-data; boundary=x') -> str:
    """The answer to a body that is sent as it is."""
    message = urllib.request.Request(url, body, {'Content-Type': kind})
    with urllib.request.urlopen(message, timeout=PATIENCE) as answer:
        return answer.read().decode()


def claim(url: str, path: str) -> str:
    """What a visitor is told who names a file that was not uploaded."""
    session = secrets.token_hex(8)
    file = dict(path=path, meta={'_type': 'gradio.FileData'})
    body = json.dumps(dict(data=[file], fn_index=0, session_hash=session)).encode()
    try:
        post(f'{url}/gradio_api/queue/join', body, 'application/json')
    except urllib.error.HTTPError as error:
        return f'{error} {error.read().decode()}'
    stream = f'{url}/gradio_api/queue/data?session_hash={session}'
    with urllib.request.urlopen(stream, timeout=PATIENCE) as events:
        for line in events:
            event = json.loads(line.removeprefix(b'data:') if line.strip() else '{}')
            if event.get('msg') == 'process_completed':
                told = event['output'].get('error') or 'refused without a reason'
                return 'served' if event['success'] else told
    return 'no answer'


def every(seconds: float, until: float, call: Callable[[], Any]) -> list:
    """What a call returned, time after time."""
    found = []
    while time.monotonic() < until:
        found.append(call())
        time.sleep(seconds)
    return found


def resident_mib(process: int) -> float:
    """Memory that a process holds."""
    lines = Path(f'/proc/{process}/status').read_text().splitlines()
    return next(int(x.split()[1]) / 1024 for x in lines if x.startswith('VmRSS'))


def stored_mib(folder: Path) -> float:
    """Size of the files below a folder."""
    sizes = [file.lstat().st_size for file in folder.rglob('*') if file.is_file()]
    return sum(sizes) / 2**20


def wait_for(url: str, page: subprocess.Popen) -> None:
    """Wait until a page is served."""
    for _ in range(600):
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            if page.poll() is not None:
                sys.exit('the page ended before it was served')
            time.sleep(0.2)
    sys.exit(f'nothing is served at {url}')


def measure_page(
    visitors: int, seconds: float, folder: Path, url: str, process: int
) -> dict:
    """Send a crowd, and watch the page meanwhile."""
    requests = draw_requests(folder, np.random.default_rng(0))
    private = [str(folder), str(Path(__file__).parents[1]), '/etc/', 'site-packages']
    crowd = Crowd(url, private, requests)
    first = connect(url, folder / 'downloads', '10.1.0.0')
    crowd.send(first, crowd.harmless[-1])  # which is slower than those that follow
    crowd.counts.clear()
    crowd.latencies.clear()
    until = time.monotonic() + seconds
    threads = [
        threading.Thread(target=crowd.visit, args=(i, until, folder / 'downloads'))
        for i in range(visitors)
    ]
    for thread in threads:
        thread.start()
    watched = every(
        2.0, until, lambda: (resident_mib(process), stored_mib(folder / 'page'))
    )
    for thread in threads:
        thread.join()
    memory, files = (list(map(round, x)) for x in zip(*watched, strict=True))
    third = len(memory) // 3
    ranks = statistics.quantiles(crowd.latencies, n=100)
    return dict(
        visitors=visitors,
        seconds=seconds,
        **{
            name: crowd.counts[name]
            for name in ('served', 'refused by name', 'asked to come back later')
        },
        **{name: crowd.counts[name] for name in ('lost', 'named a folder')},
        seconds_to_answer={f'p{p}': round(ranks[p - 1], 2) for p in (50, 90, 99)},
        memory_mib=dict(
            middle_third=max(memory[third : 2 * third]),
            last_third=max(memory[2 * third :]),
            every_2_s=memory,
        ),
        temporary_files_mib=dict(most=max(files)),
        odd=crowd.odd,
    )


def connect(url: str, downloads: Path, address: str) -> gradio_client.Client:
    """Open the page as a visitor of that address."""
    headers = {'x-forwarded-for': address}
    return gradio_client.Client(
        url, verbose=False, download_files=downloads, headers=headers
    )


def main() -> None:
    """Serve the page, send the crowd and write what was counted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument(
        '--visitors', type=int, nargs='+', default=[50], help='of each crowd'
    )
    parser.add_argument('--seconds', type=float, default=120)
    parser.add_argument('--port', type=int, default=7861)
    add_out(parser, Path('docs/reliability/page_load.json'), 'the JSON')
    args = parser.parse_args()
    out = find_out(parser, args)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / 'page').mkdir()
        torch.manual_seed(0)
        model = Predictor(Config.fromfile(args.config), None, 'cpu').model
        weights = str(folder / 'random.pth')
        torch.save(dict(state_dict=model.state_dict()), weights)
        del model
        tool = str(Path(__file__).with_name('demo_page.py'))
        page = subprocess.Popen(
            [sys.executable, tool, args.config, weights, '--port', str(args.port)],
            env={**os.environ, 'TMPDIR': str(folder / 'page')},
        )
        try:
            url = f'http://127.0.0.1:{args.port}'
            wait_for(url, page)
            results = [
                measure_page(visitors, args.seconds, folder, url, page.pid)
                for visitors in args.visitors
            ]
        finally:
            page.terminate()
            page.wait()
        left = [file.name for file in (folder / 'page').iterdir()]
    for found in results:
        print(*(f'{name}: {value}' for name, value in found.items()), sep='\n')
    about = dict(config=Path(args.config).name, files_left_at_the_end=left)
    save(out, machine('cpu') | about, results=results)
    if any(found['lost'] or found['named a folder'] for found in results):
        sys.exit('requests were lost, or answers named folders')


if __name__ == '__main__':
    run_command(main)
