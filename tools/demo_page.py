"""A page to try a segmentor or detector in the browser, and to see its groups.

``python tools/demo_page.py CONFIG CHECKPOINT`` shows what the model finds in a picture
and, on a click, the group of the pixel and the keys it selected. It serves this
machine alone unless --host says otherwise, and needs Gradio: pip install ".[demo]".
page_limits.py has its bounds; addresses of visitors behind a proxy are those that it
names in X-Forwarded-For, from this machine or those of FORWARDED_ALLOW_IPS.
"""

import argparse
import atexit
import contextlib
import ctypes
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from mmengine.config import Config
from page_limits import MAX_BYTES, Limits, sweep_forever
from PIL import Image

from mmdgt.commands import run_command
from mmdgt.frameworks import FRAMEWORKS
from mmdgt.openmmlab.apis.config import add_allow_partial, add_config
from mmdgt.openmmlab.apis.inference import Predictor, read_image
from mmdgt.openmmlab.apis.pictures import group_panels
from mmdgt.visualization import find_groups

# Silent unless the user has set it: Gradio reports to its makers by default.
os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
MAX_WAITING = 20  # visitors; more are asked to come back later
MAX_PIXELS = 25 * 10**6  # of an upload
MAX_SIDE = 1024  # pixels, to which larger pictures are shrunk
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP')  # others may start programs to be read


def read_upload(file: str) -> np.ndarray:
    """Read a picture and shrink it to what the page shows, (H, W, 3) BGR.

    Raises:
        ValueError: If it is no picture or has too many pixels; names no folder.
    """
    name = os.path.basename(file)
    try:
        with Image.open(file, formats=FORMATS) as header:  # decodes no pixels yet
            width, height = header.size
    except Exception as error:  # whatever a decoder makes of a hostile header
        raise ValueError(
            f'Expected a picture ({", ".join(FORMATS)}), got {name}'
        ) from error
    if width * height > MAX_PIXELS:
        raise ValueError(
            f'Expected a picture of at most {MAX_PIXELS / 1e6:.0f} million pixels, got'
            f' {width}x{height}. Make it smaller.'
        )
    try:
        image = read_image(file)
    except ValueError as error:  # names the folder, which is nobody's business
        raise ValueError(str(error).replace(file, name)) from error
    factor = MAX_SIDE / max(width, height)
    if factor >= 1:
        return image
    size = [max(1, round(side * factor)) for side in image.shape[1::-1]]
    return mmcv.imresize(image, size, interpolation='area')


def release_memory() -> None:
    """Give what a request has freed back to the system, where glibc would keep it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL('libc.so.6').malloc_trim(0)


class Page:
    """What the page computes.

    Args:
        predictor (Predictor): Of a segmentor or detector.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def predict(self, file: str | None) -> np.ndarray | None:
        """The picture with the prediction, (H, W, 3) RGB."""
        if file is None:  # was taken away
            return None
        return mmcv.bgr2rgb(self.predictor.draw(read_upload(file)))

    def show(
        self, file: str, stage: int, block: int, head: int, x: int, y: int
    ) -> np.ndarray:
        """The figure of the group at a pixel of the picture, (H', W', 3) RGB."""
        picture = read_upload(file)
        view, inputs = self.predictor.see(picture)
        groups = find_groups(self.predictor.model, inputs, stage, block, head)
        sizes = zip((x, y), view.shape[1::-1], picture.shape[1::-1], strict=True)
        column, row = (int(p * there / here) for p, there, here in sizes)
        return group_panels(view, groups, [(column, row)], [])


def build(page: Page) -> Any:
    """Lay the page out, a Gradio application."""
    import gradio as gr

    # Every thread that calls PyTorch gets threads and memory of its own.
    worker = ThreadPoolExecutor(1)

    def told(function: Callable) -> Callable:
        """Tell the visitor of our own errors, and of others only that there is one."""

        @wraps(function)
        def call(*args: Any) -> Any:
            try:
                return worker.submit(function, *args).result()
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from error
            except Exception as error:
                logging.exception('The page failed to answer')
                raise gr.Error('This picture could not be served.') from error
            finally:
                release_memory()

        return call

    @told
    def click(
        file: str, stage: int, block: int, head: int, event: gr.SelectData
    ) -> np.ndarray:
        return page.show(file, stage, block, head, *event.index)

    with gr.Blocks(title='mmdgt') as application:
        file = gr.File(label='Picture', type='filepath')
        take = file.async_move_resource_to_block_cache

        async def take_uploads_alone(path: str | None) -> str | None:
            """Gradio would fetch what a visitor's URL names, however large."""
            if path and '://' in path:
                raise gr.Error(
                    'Expected an uploaded picture, got the address of one.',
                    print_exception=False,
                )
            return await take(path)

        file.async_move_resource_to_block_cache = take_uploads_alone  # type: ignore
        gr.Markdown('Click on the prediction to see a group and the keys it selected.')
        found = gr.Image(show_label=False, interactive=False, format='png')
        with gr.Row():
            place = [
                gr.Number(1, label=what, precision=0, minimum=1)
                for what in ('stage', 'block', 'head')
            ]
        groups = gr.Image(show_label=False, interactive=False, format='png')
        # One at a time, for they share the model.
        queue: dict[str, Any] = dict(concurrency_id='model', concurrency_limit=1)
        file.change(told(page.predict), file, found, api_name='predict', **queue)
        found.select(click, [file, *place], groups, **queue)
    return application


def main() -> None:
    """Load the model and serve the page until interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config(parser)
    parser.add_argument('checkpoint')
    parser.add_argument(
        '--host', default='127.0.0.1', help='address to listen on; 0.0.0.0 for all'
    )
    parser.add_argument('--port', type=int, default=7860)
    access = parser.add_mutually_exclusive_group()
    access.add_argument(
        '--auth',
        action='store_true',
        help='ask visitors for the USER:PASSWORD of the variable MMDGT_PAGE_AUTH',
    )
    access.add_argument(
        '--no-auth', action='store_true', help='let anybody in who reaches the host'
    )
    add_allow_partial(parser)
    args = parser.parse_args()
    local = args.host in ('127.0.0.1', '::1', 'localhost')
    if not (local or args.auth or args.no_auth):
        parser.error(
            f'{args.host} is reached from other machines: ask visitors for a password'
            f' with --auth, or let anybody in with --no-auth'
        )
    user, _, password = os.environ.get('MMDGT_PAGE_AUTH', '').partition(':')
    if args.auth and not (user and password):
        parser.error('--auth needs MMDGT_PAGE_AUTH=USER:PASSWORD in the environment')
    cfg = Config.fromfile(args.config)
    if not FRAMEWORKS[cfg.default_scope].localizes:
        parser.error(
            'the page is for segmentors and detectors; for a classifier, see'
            ' tools/infer.py and tools/show_groups.py'
        )
    try:
        from starlette.middleware import Middleware  # comes with Gradio
    except ModuleNotFoundError as error:
        parser.error(f'{error}; the page needs Gradio: pip install ".[demo]"')
    folder = Path(tempfile.mkdtemp(prefix='mmdgt-page-'))
    os.environ['GRADIO_TEMP_DIR'] = str(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    predictor = Predictor(cfg, args.checkpoint, allow_partial=args.allow_partial)
    application = build(Page(predictor))
    threading.Thread(target=sweep_forever, args=(folder,), daemon=True).start()
    application.queue(max_size=MAX_WAITING, api_open=False).launch(
        auth=(user, password) if args.auth else None,
        server_name=args.host,
        server_port=args.port,
        max_file_size=MAX_BYTES,
        app_kwargs=dict(middleware=[Middleware(Limits, folder=folder)]),
        # One server process, without what this page has no use for.
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
    )


if __name__ == '__main__':
    run_command(main)
