"""Pictures of every kind as upright RGB pictures."""

import base64
import binascii
import os
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from huggingface_hub.utils import httpx


def load_rgb_image(source: Any, timeout: float = 5.0) -> PIL.Image.Image:
    """Opens a picture and brings it into the form that the image processor expects.

    The EXIF orientation is applied, transparency is put on white, 16 bits become 8, and of an animation the first
    frame is taken.

    Args:
        source (`str`, `os.PathLike`, `bytes` or `PIL.Image.Image`):
            A path, a URL (`http://`, `https://`, `data:`), base64 text, the bytes of a file, or a picture.
        timeout (`float`, *optional*, defaults to 5.0):
            Seconds to wait for a URL.

    Returns:
        `PIL.Image.Image`: The picture, in mode RGB.

    Raises:
        `ValueError`: If there is no readable picture. The message names the source.
    """
    if isinstance(source, PIL.Image.Image):
        return _to_rgb(source, repr(source))
    if isinstance(source, (bytes, bytearray)):
        return _decode(BytesIO(source), f"{len(source)} bytes")
    source = os.fspath(source)
    name = source if len(source) <= 100 else f"{source[:100]}..."
    if source.startswith(("http://", "https://")):
        return _decode(BytesIO(_download(source, timeout)), name)
    if os.path.exists(source):
        return _decode(source, name)
    return _decode(BytesIO(_from_base64(source, name)), name)


def _download(url: str, timeout: float) -> bytes:
    try:
        response = httpx.get(url, follow_redirects=True, timeout=timeout)
        response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"The picture {url} cannot be fetched: {error}") from error
    return response.content


def _from_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text.split(",", 1)[-1] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"The picture {name} is not there. Expected a file, a URL that starts with http:// or https://, or base64 "
            "text."
        ) from error


def _decode(file: Any, name: str) -> PIL.Image.Image:
    try:
        with PIL.Image.open(file) as image:
            return _to_rgb(image, name)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"The picture {name} cannot be read: {error}") from error


def _to_rgb(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"The picture {name} cannot be read: {error}") from error
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bit(image)
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(background, image)
    return image.convert("RGB")


def _to_8_bit(image: PIL.Image.Image) -> PIL.Image.Image:
    """A grey picture of 16 bits (or one of 32 with values of 16) in 8 bits. PIL alone would clip it to white."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode.startswith("I;16") or values.max() > 255:
        values = values / 257
    elif image.mode == "F" and values.max() <= 1:
        values = values * 255
    return PIL.Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
