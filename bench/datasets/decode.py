"""One image file to one uint8 array, with Pillow."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from bench.config import UserError
from bench.datasets.augment import Box
from bench.datasets.raw import Pixels

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
R = TypeVar("R")

#: Evaluation shows the centre of an ImageNet-size image: shorter side to 256, of which the central 224.
ZOOM = 256 / 224


@contextmanager
def opened(path: str) -> Iterator[Image]:
    """The image, its pixels not decoded yet. Errors: UserError that names the file, for decoding in the block too."""
    from PIL import Image

    # Pillow's are of tags, which say nothing of pixels, and of large images, of which the largest are refused below.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with Image.open(path) as image:
            yield image
    except UserError:
        raise
    # What Pillow's readers raise on damaged files, over its formats.
    except (OSError, EOFError, ValueError, SyntaxError, IndexError, struct.error, zlib.error) as error:
        raise UserError(f"{path}: cannot be decoded ({_one_line(error)}); replace or remove it.") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: {_one_line(error)}; make it smaller or remove it.") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def size_of(path: str) -> tuple[int, int]:
    """Width and height, from the header alone."""
    with opened(path) as image:
        return image.size


def decode(path: str) -> Image:
    """The image as RGB with 8 bits; an alpha channel is dropped."""
    with opened(path) as image:
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{path}: has more than 8 bits per channel; convert it to 8 bits.")
        if image.mode == "P":
            return image.convert("RGBA").convert("RGB")
        return image.convert("RGB")


def resized(image: Image, size: int, box: Box) -> Pixels:
    """This box of the image, bilinear with antialiasing, as (size, size, 3); unchanged where sizes agree."""
    from PIL import Image

    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``function`` of each item, in order, in as many threads as torch may use. The first error ends it.

    Threads: Pillow decodes outside the interpreter's lock. Measured on 10,000 JPEGs of 32 x 32 and 2 cores: 2.3 s
    in turn, 1.5 s in threads, 2.3 s in two fresh processes, which must first import what they need.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(function, items))
