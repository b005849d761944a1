"""Encodes PNG without an imaging library, which a report must not need."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def encode(image: NDArray[np.uint8]) -> bytes:
    """A PNG file of uint8 RGB [h, w, 3]."""
    height, width, _ = image.shape
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # first byte: filter type 1, Sub
    flat = image.reshape(height, width, 3)
    lines[:, 0] = 1
    lines[:, 1:] = np.diff(flat, axis=1, prepend=np.zeros((height, 1, 3), np.uint8)).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*one) for one in chunks)


def data_url(image: NDArray[np.uint8]) -> str:
    """The PNG as a data: URL."""
    return "data:image/png;base64," + base64.b64encode(encode(image)).decode("ascii")


def thumbnail(frame: NDArray[Any], most: int) -> NDArray[np.uint8]:
    """uint8 [3, H, W] reduced to [h, w, 3] of at most `most` pixels a side; each pixel is the mean of a square."""
    step = -(-max(frame.shape[1:]) // most)
    rows, columns = (side // step for side in frame.shape[1:])
    squares = frame[:, : rows * step, : columns * step].reshape(3, rows, step, columns, step)
    return np.ascontiguousarray(squares.mean((2, 4)).round().astype(np.uint8).transpose(1, 2, 0))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
