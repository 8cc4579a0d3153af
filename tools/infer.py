"""Predict for a picture, a folder of pictures or a video and draw what was found.

``python tools/infer.py CONFIG CHECKPOINT INPUT --out DIR``
"""

import argparse
from pathlib import Path

import cv2
import mmcv
from mmengine.config import Config
from mmengine.utils import track_iter_progress

from mmdgt.commands import run_command
from mmdgt.files import whole_file
from mmdgt.openmmlab.apis.config import add_allow_partial, add_config
from mmdgt.openmmlab.apis.inference import Predictor, read_image
from mmdgt.openmmlab.apis.pictures import write_picture


def find_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder, by their content.

    Raises:
        FileNotFoundError: If there is none.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    pictures = [path for path in files if cv2.haveImageReader(str(path))]
    if not pictures:
        raise FileNotFoundError(
            f'expected pictures in {folder}, found none among its {len(files)} files;'
            f' folders below it are not searched'
        )
    if len(pictures) < len(files):
        print(f'{len(files) - len(pictures)} other files are left out')
    return pictures


def draw_pictures(predictor: Predictor, pictures: list[Path], out: Path) -> None:
    """Write every picture with its prediction, under its own name."""
    for path in track_iter_progress(pictures):
        name = path.name if cv2.haveImageWriter(path.name) else f'{path.name}.png'
        write_picture(out / name, predictor.draw(read_image(path)))


def draw_video(predictor: Predictor, path: Path, out: Path) -> None:
    """Write the video with the predictions, as MP4."""
    video = mmcv.VideoReader(str(path))
    if video.width <= 0:  # what OpenCV does not open has 0, from OpenCV 5 on -1
        raise ValueError(
            f'{path} is damaged, or neither a picture nor a video that OpenCV reads'
        )
    file = out / f'{path.stem}.mp4'
    codec, size = cv2.VideoWriter.fourcc(*'mp4v'), (video.width, video.height)
    with whole_file(file) as part:
        writer = cv2.VideoWriter(str(part), codec, video.fps, size)
        if not writer.isOpened():
            raise OSError(f'this OpenCV writes no MP4 video to {file}')
        for frame in track_iter_progress((iter(video), len(video))):
            writer.write(predictor.draw(frame))
        writer.release()
        written = mmcv.VideoReader(str(part)).frame_cnt  # OpenCV tells of no failure
        if written != video.position:
            raise OSError(
                f'{max(written, 0)} of {video.position} frames could be written to'
                f' {file}; is the disk full?'
            )


def main() -> None:
    """Predict and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config(parser)
    parser.add_argument('checkpoint')
    parser.add_argument('input', type=Path, help='picture, folder of pictures or video')
    parser.add_argument('--out', type=Path, required=True, help='folder for results')
    add_allow_partial(parser)
    args = parser.parse_args()
    if not args.input.exists():
        parser.error(f'there is no file or folder {args.input}')
    folder = args.input if args.input.is_dir() else args.input.parent
    if args.out.resolve() == folder.resolve():
        parser.error(f'--out must be another folder than that of the input, {folder}')
    is_video = args.input.is_file() and not cv2.haveImageReader(str(args.input))
    pictures = find_pictures(args.input) if args.input.is_dir() else [args.input]
    predictor = Predictor(
        Config.fromfile(args.config),
        args.checkpoint,
        allow_partial=args.allow_partial,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    if is_video:
        draw_video(predictor, args.input, args.out)
    else:
        draw_pictures(predictor, pictures, args.out)
    print(f'\nwritten to {args.out}')


if __name__ == '__main__':
    run_command(main)
