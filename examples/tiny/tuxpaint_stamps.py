"""The stamps of Tux Paint: which there are, what they show, and which are held out of training.

Run it to choose the held-out stamps anew, from an unpacked `tuxpaint-stamps-default`:

```bash
python examples/tiny/tuxpaint_stamps.py FOLDER/usr/share/tuxpaint/stamps > examples/tiny/heldout_stamps.txt
```

The rule: stamps of one thing form a group (`group_stamps`). The groups are sorted, shuffled with seed 0, and taken one
by one until there are 100 pictures. Nothing looked at what a model makes of them.
"""

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from caption_rules import CaptionOverrides, is_caption, stamp_caption


STAMPS_FOLDER = Path("usr/share/tuxpaint/stamps")
HELDOUT_FILE = Path(__file__).parent / "heldout_stamps.txt"
HELDOUT_MINIMUM = 100
HELDOUT_SEED = 0

MIRROR_SUFFIX = "_mirror"
COLORS = "black|blue|brown|green|grey|orange|pink|purple|red|white|yellow"
# What is added to a name for one more picture of the same thing: cat2, cat-2, cat_01, cat_cartoon, cat_left, grave-c.
# Some pictures are another one in a different colour: apple_red and apple_green, redflag and whiteflag.
VARIANT_ENDING = re.compile(
    rf"[-_ ]*(?:\d+|(?<=[-_ ])(?:mirror|flip|left|right|cartoon|photo|drawing|silo|toy|{COLORS}|[a-z]))$"
)
VARIANT_BEGINNING = re.compile(rf"^(?:{COLORS})[-_ ]*(?=[a-z]{{3}})")


@dataclass(frozen=True)
class Stamp:
    """
    One stamp.

    Args:
        name (`str`):
            The picture's path below the stamps' folder, such as `animals/mammals/cats/lion-2.png`.
        caption (`str`):
            What it shows.
        mirrorable (`bool`):
            Whether its mirror image shows the same thing: false for pictures with writing in them.
    """

    name: str
    caption: str
    mirrorable: bool


def read_stamps(root: Path, overrides: CaptionOverrides) -> tuple[list[Stamp], Counter[str]]:
    """
    Read the stamps below a folder.

    Args:
        root (`Path`):
            The folder that holds `animals/`, `food/`, ...
        overrides (`CaptionOverrides`):
            The captions written by hand.

    Returns:
        `tuple[list[Stamp], Counter[str]]`: The stamps in the order of their names, and how many pictures were left out
        for which reason.
    """
    stamps: list[Stamp] = []
    skipped: Counter[str] = Counter()
    for path in sorted(path for path in root.rglob("*") if path.suffix in {".png", ".svg"}):
        name = path.relative_to(root).as_posix()
        if name.startswith("symbols/"):
            skipped["stamp is a letter, digit or symbol"] += 1
        elif path.suffix == ".svg":
            skipped["stamp is an SVG drawing"] += 1
        elif (caption := read_caption(path, name, overrides)) is None:
            skipped["stamp's caption does not say what it shows"] += 1
        else:
            stamps.append(Stamp(name, caption, is_mirrorable(path, name)))
    return stamps, skipped


def read_caption(path: Path, name: str, overrides: CaptionOverrides) -> str | None:
    """The caption of a stamp, or `None` if none says what it shows. A mirrored stamp has that of its original."""
    original = path.with_name(path.stem.removesuffix(MIRROR_SUFFIX) + ".txt")
    key = name.removesuffix(".png").removesuffix(MIRROR_SUFFIX)
    if key in overrides.stamps:
        return overrides.stamps[key]
    if not original.is_file():
        return None
    caption = stamp_caption(original.read_text(encoding="utf-8").split("\n", maxsplit=1)[0])
    return caption if is_caption(caption) else None


def is_mirrorable(path: Path, name: str) -> bool:
    """Whether a stamp may be mirrored: its data file allows it, and no mirrored version was drawn by hand."""
    if name.startswith("town/roadsigns/") or re.search(r"_(left|right|mirror)\b", name):
        return False
    data = path.with_suffix(".dat")
    forbidden = data.is_file() and "nomirror" in data.read_text(encoding="utf-8")
    return not forbidden and not path.with_name(f"{path.stem}{MIRROR_SUFFIX}.png").is_file()


def normalized_name(name: str) -> str:
    """
    The name of the thing a stamp shows, without what tells its variants apart.

    >>> normalized_name("animals/mammals/cats/Cat_cartoon-2.png")
    'cat'
    """
    stem = Path(name).stem.lower()
    while (shorter := VARIANT_ENDING.sub("", stem)) not in ("", stem):
        stem = shorter
    return re.sub(r"[-_ ]+", "", VARIANT_BEGINNING.sub("", stem))


def group_stamps(stamps: Iterable[Stamp]) -> list[list[Stamp]]:
    """
    Put stamps that show one thing together: those that share their normalized name, or their caption.

    Args:
        stamps (`Iterable[Stamp]`):
            The stamps.

    Returns:
        `list[list[Stamp]]`: The groups, sorted within and among themselves by name. No two groups share a normalized
        name or a caption.
    """
    groups: list[tuple[set[str], list[Stamp]]] = []
    for stamp in stamps:
        keys = {f"name:{normalized_name(stamp.name)}", f"caption:{stamp.caption.lower()}"}
        members = [stamp]
        separate = []
        for group_keys, group_members in groups:
            if keys & group_keys:
                keys |= group_keys
                members += group_members
            else:
                separate.append((group_keys, group_members))
        groups = [*separate, (keys, members)]
    return sorted(
        (sorted(members, key=lambda stamp: stamp.name) for _, members in groups), key=lambda members: members[0].name
    )


def choose_heldout(stamps: Iterable[Stamp], minimum: int = HELDOUT_MINIMUM, seed: int = HELDOUT_SEED) -> list[str]:
    """
    Choose the stamps to hold out, whole groups at a time.

    Args:
        stamps (`Iterable[Stamp]`):
            The stamps to choose from.
        minimum (`int`, *optional*, defaults to `100`):
            How many pictures to hold out at least.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the shuffle.

    Returns:
        `list[str]`: The names of the stamps, sorted.
    """
    groups = group_stamps(stamps)
    random.Random(seed).shuffle(groups)
    chosen: list[str] = []
    for group in groups:
        if len(chosen) >= minimum:
            break
        chosen += [stamp.name for stamp in group]
    return sorted(chosen)


def read_heldout(path: Path = HELDOUT_FILE) -> list[str]:
    """Read the names of the held-out stamps, one a line. Lines that begin with `#` are comments."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def split_stamps(stamps: Iterable[Stamp], heldout: Iterable[str]) -> tuple[list[Stamp], list[Stamp], list[Stamp]]:
    """
    Divide stamps into those to train on and those to hold out.

    Args:
        stamps (`Iterable[Stamp]`):
            All stamps.
        heldout (`Iterable[str]`):
            Names of the held-out ones.

    Returns:
        `tuple[list[Stamp], list[Stamp], list[Stamp]]`: The stamps to train on, the held-out ones, and those of neither
        kind: they are not listed, but show the same thing as a held-out one. A release of Tux Paint newer than the
        list may have such.
    """
    names = set(heldout)
    train: list[Stamp] = []
    held: list[Stamp] = []
    variants: list[Stamp] = []
    for group in group_stamps(stamps):
        if not any(stamp.name in names for stamp in group):
            train += group
            continue
        for stamp in group:
            (held if stamp.name in names else variants).append(stamp)
    return train, held, variants


def main() -> int:
    """Print the held-out stamps and return the exit status."""
    parser = argparse.ArgumentParser(description="Choose the stamps to hold out, and print their names one a line.")
    parser.add_argument(
        "stamps", type=Path, help="the folder of an unpacked tuxpaint-stamps-default with animals/, ..."
    )
    root = parser.parse_args().stamps
    stamps, _ = read_stamps(root, CaptionOverrides.load())
    if not stamps:
        print(
            f"tuxpaint_stamps.py: {root} holds no stamps; expected the folder with animals/, food/, ... in it: unpack "
            f"the package with `dpkg-deb -x` and pass its {STAMPS_FOLDER}.",
            file=sys.stderr,
        )
        return 1
    print("# Stamps of tuxpaint-stamps-default that no training run may see: whole groups of pictures of one thing,")
    print(f"# chosen by tuxpaint_stamps.py with seed {HELDOUT_SEED}.")
    print("\n".join(choose_heldout(stamps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
