"""Images in messages: raw and compressed, checked before they are decoded, always returned as RGB."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from robot_rl.core.errors import DataError
from robot_rl.data.bag.names import printable

CHANNELS = {"rgb8": 3, "bgr8": 3, "mono8": 1, "rgba8": 4, "bgra8": 4, "8UC1": 1, "8UC3": 3}
"""Bytes per pixel by encoding of ``sensor_msgs/Image``; ``8UC3`` is taken for BGR, as OpenCV's."""
MAX_PIXELS = 1 << 26
"""Largest image that is decoded."""
_PNG = b"\x89PNG\r\n\x1a\n"


def decode_image(message: Mapping[str, Any], size: tuple[int, int] | None = None) -> np.ndarray:
    """Return the image (H, W, 3) uint8, RGB, of a decoded ``Image`` or ``CompressedImage`` (JPEG, PNG).

    Args:
        message: the decoded message.
        size: (height, width) that it is scaled to.

    Raises:
        DataError: the encoding is not known, or the data do not fit what the message says.
    """
    image = _compressed(message) if "format" in message else _raw(message)
    if size is not None and image.shape[:2] != size:
        import cv2

        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    return image


def _raw(message: Mapping[str, Any]) -> np.ndarray:
    height, width, step, encoding, data = _fields(message, height=int, width=int, step=int, encoding=str)
    if encoding not in CHANNELS:
        raise DataError(f"an image of encoding '{printable(encoding, 40)}'; known: {', '.join(CHANNELS)}")
    channels = CHANNELS[encoding]
    if not 0 < height * width <= MAX_PIXELS or step < width * channels or len(data) != height * step:
        raise DataError(f"an image of {len(data)} bytes that claims {height} rows of {step} bytes and {width} pixels")
    image = data.reshape(height, step)[:, : width * channels].reshape(height, width, channels)
    if channels == 1:
        return np.repeat(image, 3, axis=2)
    order = [2, 1, 0] if encoding.startswith("b") or encoding == "8UC3" else [0, 1, 2]
    return np.ascontiguousarray(image[:, :, order])


def _compressed(message: Mapping[str, Any]) -> np.ndarray:
    import cv2

    (data,) = _fields(message)
    height, width = _dimensions(data.tobytes())
    if not 0 < height * width <= MAX_PIXELS:
        raise DataError(f"an image of {height}x{width} pixels, more than the {MAX_PIXELS} that are decoded")
    image = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise DataError(f"a compressed image of {len(data)} bytes cannot be decoded")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _fields(message: Mapping[str, Any], **kinds: type) -> tuple[Any, ...]:
    """Return fields of the given types and ``data``: a stranger's definition may have made anything of an image."""
    found = (*(message.get(name) for name in kinds), message.get("data"))
    right = all(isinstance(value, kind) for value, kind in zip(found, kinds.values(), strict=False))
    if not right or not isinstance(found[-1], np.ndarray) or found[-1].dtype != np.uint8:
        raise DataError("an image whose definition is not that of ROS 2")
    return found


def _dimensions(data: bytes) -> tuple[int, int]:
    """Return height and width that a PNG or JPEG file states, before anything is decoded."""
    if data.startswith(_PNG) and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        return height, width
    if data.startswith(b"\xff\xd8"):
        position = 2
        while position + 9 <= len(data) and data[position] == 0xFF:
            marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
            if marker == 0xFF:  # filling
                position += 1
                continue
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
                height, width = struct.unpack_from(">HH", data, position + 5)
                return height, width
            position += 2 + max(length, 2)
    raise DataError("a compressed image is neither a JPEG nor a PNG file, or is damaged")
