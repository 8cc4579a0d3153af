"""A page to try a segmentor or detector in the browser, and to see its groups.

``python tools/demo_page.py CONFIG CHECKPOINT`` shows what the model finds in a picture
and, on a click, the group of the pixel and the keys it selected. It serves this
machine alone unless --host says otherwise, and needs Gradio: pip install ".[demo]".
"""

import argparse
import os

import mmcv
import numpy as np
from mmengine.config import Config
from PIL import Image, UnidentifiedImageError

from mmdgt.configs import find_config
from mmdgt.frameworks import FRAMEWORKS
from mmdgt.openmmlab.apis.config import add_allow_partial
from mmdgt.openmmlab.apis.inference import Predictor, read_image
from mmdgt.openmmlab.apis.pictures import group_panels
from mmdgt.visualization import find_groups

# Silent unless the user has set it: Gradio reports to its makers by default.
os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
MAX_BYTES = 20 * 2**20
MAX_WAITING = 20  # visitors; more are asked to come back later
MAX_PIXELS = 4 * 2**20


def read_upload(file: str) -> np.ndarray:
    """Read a picture of limited size, (H, W, 3) BGR.

    Raises:
        ValueError: If it is no picture or has too many pixels.
    """
    try:
        with Image.open(file) as header:  # decodes no pixels yet
            width, height = header.size
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        name = os.path.basename(file)
        raise ValueError(
            f'Expected a picture such as JPEG or PNG, got {name}'
        ) from error
    if width * height > MAX_PIXELS:
        raise ValueError(
            f'Expected a picture of at most {MAX_PIXELS / 1e6:.1f} million pixels, got'
            f' {width}x{height}. Make it smaller.'
        )
    try:
        return read_image(file)
    except ValueError as error:  # names the folder, which is nobody's business
        text = str(error).replace(file, os.path.basename(file))
        raise ValueError(text) from error


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
        pixel = tuple(int(p * there / here) for p, there, here in sizes)
        return group_panels(view, groups, [pixel], [])


def build(page: Page):
    """Lay the page out, a Gradio application."""
    import gradio as gr

    def click(file, stage, block, head, event: gr.SelectData):
        return page.show(file, stage, block, head, *event.index)

    with gr.Blocks(title='mmdgt', delete_cache=(3600, 3600)) as application:
        file = gr.File(label='Picture', type='filepath')
        gr.Markdown('Click on the prediction to see a group and the keys it selected.')
        found = gr.Image(show_label=False, interactive=False, format='png')
        with gr.Row():
            place = [
                gr.Number(1, label=what, precision=0, minimum=1)
                for what in ('stage', 'block', 'head')
            ]
        groups = gr.Image(show_label=False, interactive=False, format='png')
        # One at a time, for they share the model.
        queue = dict(concurrency_id='model', concurrency_limit=1)
        file.change(page.predict, file, found, api_name='predict', **queue)
        found.select(click, [file, *place], groups, **queue)
    return application


def main() -> None:
    """Load the model and serve the page until interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'config', type=find_config, help='file, or name of a config of mmdgt'
    )
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
        application = build(
            Page(Predictor(cfg, args.checkpoint, allow_partial=args.allow_partial))
        )
    except ModuleNotFoundError as error:
        parser.error(f'{error}; the page needs Gradio: pip install ".[demo]"')
    application.queue(max_size=MAX_WAITING).launch(
        auth=(user, password) if args.auth else None,
        server_name=args.host,
        server_port=args.port,
        max_file_size=MAX_BYTES,
        show_error=True,
    )


if __name__ == '__main__':
    main()
