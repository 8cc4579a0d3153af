"""Export to ONNX: python tools/export_onnx.py CONFIG CHECKPOINT --out FILE --shape H W.

The network takes ``image``, one image of just that shape: (1, 3, H, W), float32,
0 to 255, in the order of channels of the config's mean, which is RGB in ours. It
returns ``scores``: (1, classes, H, W) of a segmentor, (1, classes) of a classifier.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmdgt.commands import run_command
from mmdgt.files import whole_file
from mmdgt.frameworks import FRAMEWORKS
from mmdgt.openmmlab.apis.config import load_config, make_parser
from mmdgt.openmmlab.checkpoints import load_weights, read_weights

# Rounding may decide an almost-tie between two groups or keys the other way, and
# with it all of a pixel's scores. So the mean error is held against a limit, over
# the mean score; an error in the network is of the size of the scores.
MAX_ERROR = 1e-3


class Network(nn.Module):
    """From pixels to scores, as the model's own test mode computes them.

    Args:
        model (nn.Module): Segmentor or classifier of OpenMMLab.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, image: Tensor) -> Tensor:
        """(1, 3, H, W) -> (1, classes, H, W) or (1, classes)."""
        preprocessor = self.model.data_preprocessor
        image = (image - preprocessor.mean) / preprocessor.std
        scores = self.model(image, mode='tensor')
        if scores.ndim == 2:
            return scores
        size, align = image.shape[2:], self.model.align_corners
        return F.interpolate(scores, size, mode='bilinear', align_corners=align)


def build(cfg: Config, checkpoint: str) -> Network:
    """Build what the config describes, with the weights of the checkpoint."""
    if not FRAMEWORKS[cfg.default_scope].exports:
        raise ValueError(
            'segmentors and classifiers can be exported, the config is of'
            f" {cfg.default_scope}; of a detector, export model.backbone by torch's own"
            ' torch.onnx.export'
        )
    init_default_scope(cfg.default_scope)
    if 'data_preprocessor' in cfg:  # as the Runner hands it over
        kind = dict(type='ClsDataPreprocessor')
        cfg.model.data_preprocessor = {**kind, **cfg.data_preprocessor}
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    partial = cfg.get('allow_partial', False)
    load_weights(model, checkpoint, read_weights(checkpoint), partial)
    return Network(model).eval()


def compare(file: Path, image: Tensor, expected: Tensor) -> float:
    """Run the file in onnxruntime; the mean error over the mean score."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    (scores,) = session.run(None, {'image': image.numpy()})
    scores = torch.from_numpy(scores)
    same = (scores.argmax(1) == expected.argmax(1)).double().mean().item()
    error = (scores - expected).abs()
    print(
        f'onnxruntime against torch, on a random image: largest error'
        f' {error.max():.1e}, mean {error.mean():.1e} with scores of'
        f' {expected.abs().mean():.1e} in the mean, the same class for {same:.2%}'
    )
    return (error.mean() / expected.abs().mean()).item()


def main() -> None:
    """Export and compare."""
    parser = make_parser('Export a segmentor or classifier to ONNX')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', type=Path, required=True, help='the .onnx file')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        required=True,
        metavar=('H', 'W'),
        help='height and width of the images in pixels',
    )
    args = parser.parse_args()
    if min(args.shape) < 32:
        parser.error(f'--shape must be at least 32 pixels a side, got {args.shape}')
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        parser.error(f'{error}; run: pip install onnx onnxruntime onnxscript')
    network = build(load_config(args), args.checkpoint)
    torch.manual_seed(0)
    image = 255 * torch.rand(1, 3, *args.shape)
    with whole_file(args.out) as part, torch.no_grad():
        torch.onnx.export(
            network,
            (image,),
            part,
            input_names=['image'],
            output_names=['scores'],
            dynamo=True,
            external_data=False,
        )
        off = compare(part, image, network(image))
        if off > MAX_ERROR:
            raise ValueError(
                f'{args.out} is not written, for it would not compute what the model'
                f' does: its error over the mean score is {off:.1e}, expected at most'
                f' {MAX_ERROR:.0e}'
            )
    print(f'{args.out}: {args.out.stat().st_size / 1e6:.1f} MB')


if __name__ == '__main__':
    run_command(main)
