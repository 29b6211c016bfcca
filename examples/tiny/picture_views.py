"""The pictures that a training run sees of one photograph or one cut-out.

The trainer does not augment, so that its results depend on nothing but its data: each picture is stored in several
views.
"""

import colorsys
import random
from collections.abc import Sequence

from PIL import Image, ImageOps


# The side of every view, in pixels, which is what the tiny model's vision encoder takes.
VIEW_SIZE = 256
# Pixels of small pictures may be enlarged this much; beyond it they are paste.
LARGEST_ENLARGEMENT = 3.0
WHITE = (255, 255, 255)
MARGIN = 0.04


def trim(picture: Image.Image) -> Image.Image:
    """Cut away the transparent margins of a picture, and return it as RGBA."""
    picture = picture.convert("RGBA")
    box = picture.getchannel("A").getbbox()
    return picture if box is None else picture.crop(box)


def on_white(cutout: Image.Image, size: int = VIEW_SIZE) -> Image.Image:
    """
    The plain picture: the whole cut-out in the middle of a white square.

    Args:
        cutout (`Image.Image`):
            The picture, with or without transparency.
        size (`int`, *optional*, defaults to `256`):
            The side of the square in pixels.

    Returns:
        `Image.Image`: An RGB picture of `size` by `size` pixels.
    """
    return paste(cutout, Image.new("RGB", (size, size), WHITE), scale=1 - 2 * MARGIN, left=0.5, top=0.5)


def paste(cutout: Image.Image, background: Image.Image, scale: float, left: float, top: float) -> Image.Image:
    """
    Paste a cut-out on a square background.

    Args:
        cutout (`Image.Image`):
            The picture, with or without transparency.
        background (`Image.Image`):
            What to paste it on; it is changed.
        scale (`float`):
            The longer side of the cut-out as a part of the background's side. Small cut-outs stay smaller than that,
            see `LARGEST_ENLARGEMENT`.
        left (`float`):
            Where it goes, from 0 (touches the left edge) to 1 (touches the right edge).
        top (`float`):
            The same for its height.

    Returns:
        `Image.Image`: The background.
    """
    cutout = trim(cutout)
    factor = min(scale * background.width / max(cutout.size), LARGEST_ENLARGEMENT)
    size = (max(1, round(cutout.width * factor)), max(1, round(cutout.height * factor)))
    # Premultiplied alpha keeps the colour of fully transparent pixels from bleeding into the edges.
    cutout = cutout.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    position = (round(left * (background.width - cutout.width)), round(top * (background.height - cutout.height)))
    background.paste(cutout, position, mask=cutout)
    return background


def cutout_views(
    cutout: Image.Image, count: int, mirrorable: bool, backgrounds: Sequence[Image.Image], rng: random.Random
) -> list[Image.Image]:
    """
    Views of a cut-out: first the plain one, then others at random sizes and places before random backgrounds.

    Args:
        cutout (`Image.Image`):
            The picture, with or without transparency.
        count (`int`):
            How many views.
        mirrorable (`bool`):
            Whether half of the later views, at random, are mirrored.
        backgrounds (`Sequence[Image.Image]`):
            Photographic backgrounds, possibly none.
        rng (`random.Random`):
            Where the randomness comes from.

    Returns:
        `list[Image.Image]`: RGB pictures of `VIEW_SIZE` by `VIEW_SIZE` pixels.
    """
    views = [on_white(cutout)]
    while len(views) < count:
        background = random_background(backgrounds, rng)
        picture = ImageOps.mirror(cutout) if mirrorable and rng.random() < 0.5 else cutout
        views.append(paste(picture, background, rng.uniform(0.45, 1.0), rng.random(), rng.random()))
    return views[:count]


def random_background(backgrounds: Sequence[Image.Image], rng: random.Random) -> Image.Image:
    """A white square (two in five), a light colour (two in five) or a part of a photographic background."""
    kind = rng.random()
    if kind < 0.4:
        return Image.new("RGB", (VIEW_SIZE, VIEW_SIZE), WHITE)
    if kind < 0.8 or not backgrounds:
        color = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.03, 0.3), rng.uniform(0.85, 1.0))
        return Image.new("RGB", (VIEW_SIZE, VIEW_SIZE), tuple(round(255 * channel) for channel in color))
    return random_crop(rng.choice(backgrounds), (0.2, 0.8), rng)


def photograph_views(photograph: Image.Image, count: int, mirrorable: bool, rng: random.Random) -> list[Image.Image]:
    """
    Views of a photograph: first all of it, then random crops of at least half its area.

    Args:
        photograph (`Image.Image`):
            The photograph.
        count (`int`):
            How many views.
        mirrorable (`bool`):
            Whether half of the crops, at random, are mirrored.
        rng (`random.Random`):
            Where the randomness comes from.

    Returns:
        `list[Image.Image]`: RGB pictures of `VIEW_SIZE` by `VIEW_SIZE` pixels.
    """
    photograph = photograph.convert("RGB")
    views = [photograph.resize((VIEW_SIZE, VIEW_SIZE), Image.Resampling.BICUBIC)]
    while len(views) < count:
        crop = random_crop(photograph, (0.5, 1.0), rng)
        views.append(ImageOps.mirror(crop) if mirrorable and rng.random() < 0.5 else crop)
    return views[:count]


def random_crop(picture: Image.Image, area: tuple[float, float], rng: random.Random) -> Image.Image:
    """A random part of a picture, of `area[0]` to `area[1]` of its area and about its proportions, as a square."""
    side = rng.uniform(*area) ** 0.5
    stretch = rng.uniform(0.9, 1.1)
    width = min(picture.width, round(picture.width * side * stretch))
    height = min(picture.height, round(picture.height * side / stretch))
    left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
    box = (left, top, left + width, top + height)
    return picture.resize((VIEW_SIZE, VIEW_SIZE), Image.Resampling.BICUBIC, box=box)
