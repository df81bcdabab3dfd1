"""How a picture's object lies in its frame: alike for training views and for users' pictures."""

from collections.abc import Callable

import numpy as np
from pyarrow import fs

from tasks.shards import read_image

FILL = 0.95  # of the frame that the object's larger side takes
OPAQUE = 127  # alpha above which a pixel is the object's


def frame_object(pixels: np.ndarray, size: int) -> np.ndarray:
    """Crop RGBA pixels [H, W, 4] uint8 to the object and centre it in [size, size, 4].

    The larger of its sides takes FILL of the frame. Raises ValueError when nothing is opaque.
    """
    from PIL import Image  # a machine that trains the VAE alone has no need of it

    rows, columns = np.nonzero(pixels[..., 3] > OPAQUE)
    if not len(rows):
        raise ValueError("the picture shows no object: nothing of it is opaque")
    top, left = rows.min(), columns.min()
    height, width = rows.max() + 1 - top, columns.max() + 1 - left
    side = int(np.ceil(max(height, width) / FILL))
    square = np.zeros((side, side, 4), np.uint8)
    y, x = (side - height) // 2, (side - width) // 2
    square[y : y + height, x : x + width] = pixels[top : top + height, left : left + width]
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS))


def read_framed(
    filesystem: fs.FileSystem, path: str, row_group: int, view: int | Callable[[int], int]
) -> np.ndarray:
    """Return one stored view as `read_image` does, framed as a user's picture of it would be.

    A camera sees an object off its centre: a model that was trained on such views alone does not
    know them once they are framed. A view that shows nothing, of a hair, stays as it is.
    """
    pixels = read_image(filesystem, path, row_group, view)
    shows_object = (pixels[..., 3] > OPAQUE).any()
    return frame_object(pixels, len(pixels)) if shows_object else pixels
