"""Time DGT beside Swin and ConvNeXt: backbone, UperNet, Mask R-CNN.

    python tools/benchmark_model.py --models dgt_t,swin_t --sizes 224x224,512x2048
    python tools/benchmark_model.py --tasks upernet --passes train --breakdown

All models of a line take turns, so that a change of clocks meets them all. Weights
are random. A forward pass is in evaluation mode without gradients; a training step
is forward, backward and AdamW, with the centroids of DGT moved as its hook does.
bfloat16 is autocast, as --amp trains. Compiled forward passes take the weights for
constants (freezing). DGT selects K = 98 keys up to 224x224 pixels and 392 beyond, as
the paper.

Memory is the peak of weights, optimizer, features and all: on a GPU what PyTorch
allocated, on the CPU the resident size of a fresh process, less what it was before
the model was run, plus the weights.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch._inductor.config
from measure import (
    add_words,
    in_fresh_process,
    in_turns,
    machine,
    output_folder,
    peak_bytes,
    print_columns,
    save,
    summary,
)
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from mmdgt import DGT, update_centroids
from mmdgt.commands import run_command
from mmdgt.files import whole_file

CONFIGS = Path(__file__).parents[1] / 'configs'
DROP_PATH = 0.2
MODES = ('eager', 'compiled', 'deploy', 'deploy_compiled')


class Case(NamedTuple):
    """One line's model; the line is all but the model and the mode."""

    task: str
    size: tuple[int, int]
    batch: int
    which: str  # forward | train
    dtype: str
    layout: str
    model: str
    mode: str

    def row(self) -> dict:
        """As the JSON has it."""
        row = self._asdict()
        return row | {'size': 'x'.join(map(str, self.size)), 'pass': row.pop('which')}


class ChannelsFirst(nn.Module):
    """Feature maps (B, H, W, C) of timm's Swin as (B, C, H, W)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> four feature maps."""
        return tuple(out.permute(0, 3, 1, 2) for out in self.model(x))


class PlainBatchNorm(nn.BatchNorm2d):
    """Is not torch's own, so a GELU before it and the norm run layer by layer."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return super().forward(x)


def dgt(arch: str, size: tuple[int, int], **settings: Any) -> nn.Module:
    """This package's."""
    num_keys = 98 if size[0] * size[1] <= 224 * 224 else 392
    return DGT(arch, **dict(num_keys=num_keys, drop_path_rate=DROP_PATH) | settings)


def mmpretrain(kind: str, size: tuple[int, int], **settings: Any) -> nn.Module:
    """A backbone of mmpretrain."""
    from mmpretrain.registry import MODELS as models

    common = dict(out_indices=(0, 1, 2, 3), drop_path_rate=DROP_PATH)
    return models.build(dict(type=f'mmpretrain.{kind}', **common, **settings))


def swin(arch: str, size: tuple[int, int]) -> nn.Module:
    """A Swin of mmpretrain, which pads what is smaller than a window only if told."""
    pad = min(size) < 224
    return mmpretrain('SwinTransformer', size, arch=arch, pad_small_map=pad)


def timm_swin(name: str, size: tuple[int, int]) -> nn.Module:
    """A Swin of timm."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise RuntimeError(
            'timm is not installed; "pip install timm", or choose --models without it'
        ) from error
    name = f'swin_{name}_patch4_window7_224'
    settings: dict[str, Any] = dict(
        features_only=True, img_size=size, drop_path_rate=DROP_PATH
    )
    return ChannelsFirst(timm.create_model(name, **settings))


# Name: how to build the backbone, and its channels in the first stage.
BACKBONES = {
    'dgt_t': (functools.partial(dgt, 'tiny'), 64),
    'dgt_t_k392': (functools.partial(dgt, 'tiny', num_keys=392), 64),
    'dgt_t_plain': (functools.partial(dgt, 'tiny', norm_layer=PlainBatchNorm), 64),
    'dgt_t_plain_cp': (
        functools.partial(dgt, 'tiny', norm_layer=PlainBatchNorm, with_cp=True),
        64,
    ),
    'dgt_s': (functools.partial(dgt, 'small'), 96),
    'dgt_b': (functools.partial(dgt, 'base'), 128),
    'convnext_t': (
        functools.partial(
            mmpretrain, 'ConvNeXt', arch='tiny', gap_before_final_norm=False
        ),
        96,
    ),
}
for _arch, _dims in (('tiny', 96), ('small', 96), ('base', 128)):
    BACKBONES[f'swin_{_arch[0]}'] = functools.partial(swin, _arch), _dims
    BACKBONES[f'timm_swin_{_arch[0]}'] = functools.partial(timm_swin, _arch), _dims


@MODELS.register_module()
def BenchmarkBackbone(name: str, size: tuple[int, int]) -> nn.Module:
    """A backbone by name, as configs ask for it."""
    return BACKBONES[name][0](size)


def build(case: Case) -> nn.Module:
    """The backbone alone, or inside the UperNet or Mask R-CNN of our configs."""
    backbone = dict(type='BenchmarkBackbone', name=case.model, size=case.size)
    if case.task == 'backbone':
        return MODELS.build(backbone)
    dims = [BACKBONES[case.model][1] << stage for stage in range(4)]
    if case.task == 'upernet':
        cfg = Config.fromfile(CONFIGS / 'upernet_dgt_t_ade20k.py')
        cfg.model.decode_head.in_channels = dims
        cfg.model.auxiliary_head.in_channels = dims[2]
    else:
        cfg = Config.fromfile(CONFIGS / 'mask_rcnn_dgt_t_1x_coco.py')
        cfg.model.neck.in_channels = dims
    cfg.model.backbone = backbone
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return revert_sync_batchnorm(MODELS.build(cfg.model))


def segmentation_samples(case: Case, device: str) -> list:
    """A random label for every pixel."""
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(case.batch):
        labels = torch.randint(150, (1, *case.size), device=device)
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels)))
    return samples


def detection_samples(case: Case, device: str) -> list:
    """Eight random objects, each filling its box."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    H, W = case.size
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(case.batch):
        top, left = rng.integers(0, (H // 2, W // 2), (8, 2)).T
        boxes = np.stack([left, top, left + W // 4, top + H // 4], 1)
        masks = np.zeros((8, H, W), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            mask[y1:y2, x1:x2] = 1
        shape = dict(
            img_shape=(H, W),
            ori_shape=(H, W),
            pad_shape=(H, W),
            batch_input_shape=(H, W),
            scale_factor=(1.0, 1.0),
        )
        sample = DetDataSample(metainfo=shape)
        sample.gt_instances = InstanceData(
            bboxes=torch.as_tensor(boxes, dtype=torch.float32, device=device),
            labels=torch.as_tensor(rng.integers(0, 80, 8), device=device),
            masks=BitmapMasks(masks, H, W),
        )
        sample.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4, device=device),
            labels=torch.zeros(0, dtype=torch.long, device=device),
        )
        samples.append(sample)
    return samples


SAMPLES = {
    'backbone': lambda case, device: None,
    'upernet': segmentation_samples,
    'mask_rcnn': detection_samples,
}


def prepare(case: Case, device: str) -> tuple[nn.Module, Callable[[], Any]]:
    """A model, and the function that runs it once."""
    torch.manual_seed(0)
    model: Any = build(case).to(device)
    model.train(case.which == 'train')
    backbone = model if case.task == 'backbone' else model.backbone
    images = torch.randn(case.batch, 3, *case.size, device=device)
    samples = SAMPLES[case.task](case, device)
    if case.layout == 'channels_last':
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    if case.mode.startswith('deploy'):
        backbone.switch_to_deploy()
    if case.mode.endswith('compiled'):
        backbone.compile()
    half = case.dtype == 'bfloat16'

    def run(mode: str) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            if case.task == 'backbone':
                return model(images)
            return model(images, samples, mode=mode)

    @torch.no_grad()
    def forward() -> None:
        run('tensor')

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)

    def train() -> None:
        out = run('loss')
        if case.task == 'backbone':
            # The gradient of a norm's mean square would vanish, and arithmetic with
            # numbers next to zero is slow.
            loss = sum(features.float().pow(3).sum() for features in out)
        else:
            loss, _ = model.parse_losses(out)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_centroids(model, keep=1e-5)

    return model, forward if case.which == 'forward' else train


def peak_of(case: Case, device: str) -> int:
    """The bytes that a case takes at its peak, in a process of its own."""
    # A first training step makes AdamW's state.
    return peak_bytes(*prepare(case, device), device, times=2)


def start(case: Case, device: str, with_memory: bool) -> tuple[Callable[[], Any], dict]:
    """A function that runs the model once, warmed up, and the memory it takes."""
    _, call = prepare(case, device)
    call()
    # The process that compiles takes more memory for it than for the model.
    compiles = device == 'cpu' and case.mode.endswith('compiled')
    if compiles or not with_memory:
        return call, {}
    return call, dict(peak_bytes=in_fresh_process(peak_of, case, device))


def measure(cases: list[Case], args: argparse.Namespace) -> list[dict]:
    """Times of cases that differ in model and mode, a list of dicts."""
    rows, calls = {}, {}
    for case in cases:
        rows[case] = case.row()
        try:
            calls[case], peak = start(case, args.device, args.memory)
            rows[case] |= peak
        except Exception as error:
            message = f'{type(error).__name__}: {error}'
            rows[case]['error'] = message.splitlines()[0][:300]
    for case, times in in_turns(calls, args.device, args.rounds, args.budget).items():
        rows[case] |= summary(times, 'ms', 1e3)
        rows[case]['images_per_s'] = round(1e3 * case.batch / rows[case]['ms'], 3)
    return list(rows.values())


# Which part an operator of PyTorch belongs to, by words in its name.
PARTS = {
    'activation': ('gelu',),  # with the norm behind it, where one kernel does both
    'attention': ('mmdgt', 'scaled_dot_product'),
    'convolution': ('conv',),
    'linear': ('addmm', 'aten::mm'),
    'norm': ('_norm',),
    'sum': ('aten::add',),
    'copy': ('copy_',),  # between layouts and types, and of a linear layer's bias
    'optimizer': ('optimizer', 'foreach', 'lerp', 'addcdiv', 'sqrt'),
}


def breakdown(case: Case, args: argparse.Namespace) -> dict:
    """The share of every part in the time of one call."""
    from torch.profiler import ProfilerActivity, profile

    _, call = prepare(case, args.device)
    call()
    activities = [ProfilerActivity.CPU]
    if args.device == 'cuda':
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        call()
    kind = 'device' if args.device == 'cuda' else 'cpu'
    spent = dict.fromkeys([*PARTS, 'other'], 0.0)
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, counted with the operator that launched it
        name = event.key.lower()
        found = (p for p, words in PARTS.items() if any(w in name for w in words))
        spent[next(found, 'other')] += getattr(event, f'self_{kind}_time_total')
    total = sum(spent.values())
    return case.row() | {part: round(time / total, 3) for part, time in spent.items()}


def print_table(rows: list[dict]) -> None:
    """One line for what all models share; milliseconds and MiB of every model."""
    shared = ('task', 'size', 'batch', 'pass', 'dtype', 'layout')
    lines: dict[tuple, dict[str, str]] = {}
    for row in rows:
        cell = f'{row["ms"]:.1f}' if 'ms' in row else '-'
        if 'peak_bytes' in row:
            cell += f' / {row["peak_bytes"] / 2**20:.0f}'
        line = lines.setdefault(tuple(str(row[key]) for key in shared), {})
        line[f'{row["model"]} {row["mode"]}'] = cell
    columns = list(dict.fromkeys(name for line in lines.values() for name in line))
    print('ms / MiB at the peak')
    body = [[*key, *(x.get(c, '') for c in columns)] for key, x in lines.items()]
    print_columns([[*shared, *columns], *body])


def plot(rows: list[dict], folder: Path, name: str) -> None:
    """Time and memory against pixels: a picture for all that differs in size alone."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    pictures: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        key = [str(row[k]) for k in ('task', 'pass', 'batch', 'dtype', 'layout')]
        lines = pictures.setdefault('_'.join([name, *key]), {})
        lines.setdefault(f'{row["model"]} {row["mode"]}', []).append(row)
    for title, lines in pictures.items():
        figure, both = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
        for axes, what, unit, label in (
            (both[0], 'ms', 1, 'time, ms'),
            (both[1], 'peak_bytes', 2**20, 'peak memory, MiB'),
        ):
            for model, measured in lines.items():
                points = sorted(
                    (np.prod([int(side) for side in row['size'].split('x')]), row[what])
                    for row in measured
                    if what in row
                )
                if points:
                    pixels, values = np.array(points).T
                    axes.loglog(pixels, values / unit, marker='o', label=model)
                    axes.legend()
            axes.set(xlabel='pixels', ylabel=label)
            axes.grid(alpha=0.3)
        with whole_file(folder / f'{title}.png') as part:
            figure.savefig(part, dpi=150)
        plt.close(figure)


def size_of(text: str) -> tuple[int, int]:
    """'512x2048' as height and width."""
    try:
        height, width = map(int, text.split('x'))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'a size must be HEIGHTxWIDTH, such as 512x2048, got {text!r}'
        ) from None
    return height, width


def main() -> None:
    """Measure what the command line asks for."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choice = functools.partial(add_words, parser)
    choice('--tasks', SAMPLES, 'backbone')
    choice('--models', BACKBONES, 'dgt_t,swin_t,timm_swin_t,convnext_t')
    choice('--modes', MODES, 'eager')
    choice('--passes', ('forward', 'train'), 'forward,train')
    choice('--dtypes', ('float32', 'bfloat16'), 'float32')
    choice('--layouts', ('contiguous', 'channels_last'), 'contiguous')
    parser.add_argument(
        '--sizes',
        type=lambda text: [size_of(size) for size in text.split(',')],
        default='224x224',
        help='HEIGHTxWIDTH, the paper has 224x224, 512x2048, 800x1280; several give'
        ' a plot',
    )
    parser.add_argument(
        '--batches', type=lambda text: [int(b) for b in text.split(',')], default='1'
    )
    parser.add_argument('--device', default=device)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument(
        '--budget', type=float, default=10, help='seconds after which a model stops'
    )
    parser.add_argument('--memory', action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        '--breakdown', action='store_true', help='the parts of eager DGT'
    )
    parser.add_argument(
        '--out', type=output_folder, help='folder of the JSON and the plots'
    )
    parser.add_argument('--name', default='model')
    args = parser.parse_args()
    # Where nothing needs a gradient, a compiled model has its weights packed ahead.
    torch._inductor.config.freezing = True

    rows, parts = [], []
    for line in itertools.product(
        args.tasks, args.sizes, args.batches, args.passes, args.dtypes, args.layouts
    ):
        cases = [
            case
            for case in itertools.starmap(
                lambda *which, line=line: Case(*line, *which),
                itertools.product(args.models, args.modes),
            )
            if not case.mode.startswith('deploy')
            or (case.which == 'forward' and case.model.startswith('dgt'))
        ]
        rows += measure(cases, args)
        if args.breakdown:
            parts += [
                breakdown(case, args)
                for case in cases
                if case.mode == 'eager' and case.model.startswith('dgt')
            ]
    print_table(rows)
    for row in rows:
        if 'error' in row:
            print(f'{row["model"]} {row["mode"]}, {row["pass"]}: {row["error"]}')
    for row in parts:
        shares = ', '.join(f'{part} {row[part]:.0%}' for part in [*PARTS, 'other'])
        print(f'{row["model"]} {row["task"]} {row["size"]} {row["pass"]}: {shares}')
    if args.out:
        about = machine(args.device)
        save(args.out / f'{args.name}.json', about, results=rows, breakdown=parts)
        if len(args.sizes) > 1:
            plot(rows, args.out, args.name)


if __name__ == '__main__':
    run_command(main)
