"""Where the tiny model's pictures come from, and what is said about each of them."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from caption_rules import (
    CaptionOverrides,
    as_sentence,
    emoji_caption,
    is_caption,
    photograph_caption,
    photograph_kind,
    with_article,
)
from PIL import Image
from registry_packages import Package
from tuxpaint_stamps import STAMPS_FOLDER, Stamp, read_heldout, read_stamps, split_stamps


STAMPS = Package(
    name="tuxpaint-stamps-default",
    registry="debian",
    file_pattern="tuxpaint-stamps-default_*.deb",
    num_bytes=160_880_444,
)
FLUENT_EMOJI = Package(
    name="@lobehub/fluent-emoji-3d",
    registry="npm",
    version="1.1.0",
    file_pattern="lobehub-fluent-emoji-3d-1.1.0.tgz",
    num_bytes=15_792_027,
)
GOOGLE_EMOJI = Package(
    name="emoji-datasource-google",
    registry="npm",
    version="16.0.0",
    file_pattern="emoji-datasource-google-16.0.0.tgz",
    num_bytes=74_344_091,
)
BACKGROUNDS = Package(
    name="gnome-backgrounds",
    registry="debian",
    file_pattern="gnome-backgrounds_*.deb",
    num_bytes=32_546_832,
)

EMOJI_OF_THINGS = {"Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects"}
CLOCK_FACE = re.compile(r"clock\d+")
PHOTOGRAPH_NAME = re.compile(r"(?P<synset>n\d{8})_(?P<class_name>.+)")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class Picture:
    """
    One picture and what it shows.

    Args:
        source (`str`):
            The source's name, such as `tuxpaint-stamps`.
        name (`str`):
            The picture's name within its source.
        path (`Path`):
            The picture's file.
        caption (`str`):
            What it shows, in one short sentence.
        split (`Literal["train", "heldout"]`):
            Whether a model may be trained on it.
        mirrorable (`bool`):
            Whether its mirror image fits the caption as well.
        is_cutout (`bool`):
            Whether it is one thing without surroundings, to be pasted on a background.
        plain_caption (`str`, *optional*):
            The same in a plainer word, such as `A cat.` for a tabby; three views in five have it.
    """

    source: str
    name: str
    path: Path
    caption: str
    split: Literal["train", "heldout"] = "train"
    mirrorable: bool = True
    is_cutout: bool = True
    plain_caption: str | None = None

    def caption_of_view(self, view: int) -> str:
        """The caption of one of its views, counted from 0."""
        return self.plain_caption if self.plain_caption and view % 5 in (1, 3, 4) else self.caption


def stamp_pictures(unpacked: Path, overrides: CaptionOverrides) -> tuple[list[Picture], Counter[str]]:
    """The stamps of an unpacked `tuxpaint-stamps-default`, and how many were left out for which reason."""
    root = unpacked / STAMPS_FOLDER
    stamps, skipped = read_stamps(root, overrides)
    train, heldout, variants = split_stamps(stamps, read_heldout())
    skipped["stamp is an unlisted variant of a held-out one"] += len(variants)

    def picture(stamp: Stamp, split: Literal["train", "heldout"]) -> Picture:
        return Picture("tuxpaint-stamps", stamp.name, root / stamp.name, stamp.caption, split, stamp.mirrorable)

    return [picture(stamp, "train") for stamp in train] + [picture(stamp, "heldout") for stamp in heldout], +skipped


def emoji_pictures(
    source: str, records: list[dict], folder: Path, suffix: str, overrides: CaptionOverrides
) -> tuple[list[Picture], Counter[str]]:
    """
    The emoji that show things.

    Args:
        source (`str`):
            What to call the source.
        records (`list[dict]`):
            The content of `emoji.json`, see [`read_emoji_records`].
        folder (`Path`):
            The folder of the pictures, each named by its code points.
        suffix (`str`):
            The suffix of the pictures' names.
        overrides (`CaptionOverrides`):
            The captions written by hand.

    Returns:
        `tuple[list[Picture], Counter[str]]`: The pictures, and how many emoji were left out for which reason.
    """
    pictures: list[Picture] = []
    skipped: Counter[str] = Counter()
    for record in records:
        short_name = record["short_name"]
        path = folder / f"{record['unified'].lower()}{suffix}"
        caption = overrides.emoji.get(short_name, emoji_caption(record["name"]))
        if record["category"] not in EMOJI_OF_THINGS:
            skipped[f"emoji is of the category {record['category']}"] += 1
        elif CLOCK_FACE.fullmatch(short_name):
            skipped["emoji is one of 24 clock faces"] += 1
        elif caption is None or not is_caption(caption):
            skipped["emoji is a symbol, not a thing"] += 1
        elif not path.is_file():
            skipped["emoji has no picture in this set"] += 1
        else:
            mirrorable = short_name not in overrides.emoji_with_writing
            pictures.append(Picture(source, path.name, path, caption, mirrorable=mirrorable))
    skin_tones = sum(len(record.get("skin_variations", {})) for record in records)
    return pictures, +(skipped + Counter({"emoji is a skin tone variant": skin_tones}))


def read_emoji_records(unpacked: Path) -> list[dict]:
    """The records of `emoji.json` in an unpacked `emoji-datasource-google`."""
    return json.loads((unpacked / "package" / "emoji.json").read_text(encoding="utf-8"))


def photograph_pictures(folder: Path, overrides: CaptionOverrides) -> tuple[list[Picture], Counter[str]]:
    """
    The photographs of a folder that names each by its ImageNet class, as `n02123045_tabby.jpg`.

    Args:
        folder (`Path`):
            The folder.
        overrides (`CaptionOverrides`):
            The captions written by hand, by class name or, where two classes share one, by the whole name.

    Returns:
        `tuple[list[Picture], Counter[str]]`: The photographs, and how many files were left out for which reason.
    """
    pictures: list[Picture] = []
    skipped: Counter[str] = Counter()
    for path in sorted(folder.iterdir()):
        match = PHOTOGRAPH_NAME.fullmatch(path.stem)
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            skipped["file beside the photographs is no picture"] += 1
        elif match is None:
            skipped["photograph's name is not like n02123045_tabby.jpg"] += 1
        else:
            class_name = match["class_name"]
            phrase = overrides.photographs.get(path.stem, overrides.photographs.get(class_name.replace("_", " ")))
            caption = photograph_caption(class_name) if phrase is None else f"{phrase[:1].upper()}{phrase[1:]}."
            mirrorable = class_name not in overrides.photographs_with_writing
            kind = photograph_kind(match["synset"])
            is_plainer = kind is not None and kind not in caption.lower()
            pictures.append(
                Picture(
                    "imagenet-sample-images",
                    path.name,
                    path,
                    caption,
                    mirrorable=mirrorable,
                    is_cutout=False,
                    plain_caption=as_sentence(with_article(kind)) if kind and is_plainer else None,
                )
            )
    return pictures, skipped


def read_backgrounds(unpacked: Path, shorter_side: int = 512) -> list[Image.Image]:
    """The wallpapers of an unpacked `gnome-backgrounds` that are pixel pictures, made smaller."""
    backgrounds = []
    for path in sorted((unpacked / "usr/share/backgrounds/gnome").iterdir()):
        if path.suffix not in IMAGE_SUFFIXES:
            continue
        with Image.open(path) as picture:
            if min(picture.size) >= shorter_side:
                factor = shorter_side / min(picture.size)
                size = (round(picture.width * factor), round(picture.height * factor))
                backgrounds.append(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    return backgrounds
