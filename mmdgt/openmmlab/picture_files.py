"""Pictures that are no good, found before OpenCV reads them."""

import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from PIL import Image, UnidentifiedImageError

SECONDS = 20.0  # that it takes at most; pictures behind are looked at as they come
MAX_PIXELS = 100 * 10**6  # of a picture
READERS = 16
# What a whole file ends with, but for what some programs append. One where more is
# appended, such as a film by a phone, is decoded to see whether it is whole.
ENDS = {'JPEG': b'\xff\xd9', 'PNG': b'IEND'}
APPENDED = 4096


def check_pictures(dataset: Any, seconds: float = SECONDS) -> int:
    """Look at the header and the end of every picture of a data set.

    Args:
        dataset (Dataset): mmengine's; one that doesn't name its files is let pass.
        seconds (float): How long to look.

    Returns:
        int: Number of the pictures that were looked at.

    Raises:
        FileNotFoundError, ValueError: If one is not there, is none or is cut off.
    """
    if not hasattr(dataset, 'get_data_info'):
        return 0
    deadline, number = time.monotonic() + seconds, 0
    with ThreadPoolExecutor(READERS) as readers:
        for files in _some_at_a_time(_local_files(dataset), 64 * READERS):
            list(readers.map(check_picture, files))  # raises what they raise
            number += len(files)
            if time.monotonic() > deadline:
                print_log(
                    f'Looked at {number} of {len(dataset)} pictures before the start.',
                    logger='current',
                    level=logging.INFO,
                )
                break
    return number


def check_picture(file: str | Path, decode: bool = False) -> None:
    """Raise where OpenCV would fill up memory, or fill a truncated picture with grey.

    Args:
        file (str | Path): A picture.
        decode (bool): Whether to look at its pixels, too, not at its two ends alone.

    Raises:
        FileNotFoundError, ValueError: If it is not there or is no good.
    """
    try:
        with Image.open(file) as picture:  # decodes no pixels yet
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ValueError(
                    f'{file} has {width}x{height} pixels, expected at most'
                    f' {MAX_PIXELS / 1e6:.0f} million: make it smaller'
                )
            if decode or ENDS.get(picture.format or '', b'') not in _last_bytes(file):
                picture.load()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f'expected a picture, but there is no file {file}'
        ) from error
    except UnidentifiedImageError as error:
        if not _last_bytes(file):
            raise ValueError(f'{file} is damaged or no picture: it is empty') from error
        # OpenCV knows other formats.
    except Image.DecompressionBombError as error:
        raise ValueError(f'{file} has too many pixels: {error}') from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f'{file} is damaged or no picture: {error}') from error


def _last_bytes(file: str | Path) -> bytes:
    with open(file, 'rb') as stream:
        stream.seek(max(0, Path(file).stat().st_size - APPENDED))
        return stream.read()


def _local_files(dataset: Any) -> Iterator[str]:
    for index in range(len(dataset)):
        file = dataset.get_data_info(index).get('img_path')
        if file and '://' not in file:
            yield file


def _some_at_a_time(items: Iterable, number: int) -> Iterator[list]:
    some = []
    for item in items:
        some.append(item)
        if len(some) == number:
            yield some
            some = []
    yield some
