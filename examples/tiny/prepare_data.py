"""Prepare the tiny model's training data: real pictures with captions, from public packages.

```bash
python examples/tiny/prepare_data.py --output runs/tiny-data --photographs imagenet-sample-images
```

The pictures come from Debian's `tuxpaint-stamps-default`, from npm's `@lobehub/fluent-emoji-3d` and
`emoji-datasource-google`, and from a folder of photographs named by their ImageNet class (a clone of
github.com/EliSchwartz/imagenet-sample-images). Debian's `gnome-backgrounds` gives backgrounds for cut-outs.

The output is a folder for `datasets.load_from_disk`: a `DatasetDict` with the splits `train` and `heldout` and the
columns `image`, `caption`, `source`, `split` and `name`, and a `report.json` with counts. The stamps that
`heldout_stamps.txt` lists, and no others, are in `heldout`.
"""

import argparse
import io
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from caption_rules import CaptionOverrides
from picture_sources import (
    BACKGROUNDS,
    FLUENT_EMOJI,
    GOOGLE_EMOJI,
    STAMPS,
    Picture,
    emoji_pictures,
    photograph_pictures,
    read_backgrounds,
    read_emoji_records,
    stamp_pictures,
)
from picture_views import cutout_views, on_white, photograph_views
from PIL import Image
from registry_packages import Package, PackageError, fetch_package, unpack_package
from tqdm.auto import tqdm


SOURCES = ("stamps", "fluent-emoji", "google-emoji", "photographs")
SPLITS = ("train", "heldout")
JPEG_QUALITY = 90
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "caption": datasets.Value("string"),
        "source": datasets.Value("string"),
        "split": datasets.Value("string"),
        "name": datasets.Value("string"),
    }
)


@dataclass
class Report:
    """What went into the data and what did not, by reason."""

    pictures: Counter[tuple[str, str]] = field(default_factory=Counter)
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, dict]:
        """The report as it is written to `report.json`."""

        def by_split(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
            return {
                split: {source: count for (of_split, source), count in sorted(counts.items()) if of_split == split}
                for split in SPLITS
            }

        skipped = dict(sorted(self.skipped.items()))
        return {"pictures": by_split(self.pictures), "rows": by_split(self.rows), "skipped": skipped}

    def as_text(self) -> str:
        """The report as it is printed."""
        lines = [
            f"{split:8} {source:24} {count:6} pictures {self.rows[split, source]:7} rows"
            for (split, source), count in sorted(self.pictures.items(), reverse=True)
        ]
        lines += [f"skipped {count:5}: {reason}" for reason, count in sorted(self.skipped.items())]
        return "\n".join(lines)


class PackageFolder:
    """Fetches and unpacks each package once, into a folder that is thrown away afterwards."""

    def __init__(self, work: Path, downloads: Path | None = None):
        self.work = work
        self.downloads = downloads or work / "downloads"

    def unpacked(self, package: Package) -> Path:
        """The folder with the package's content."""
        folder = self.work / "unpacked" / package.name.replace("/", "-")
        if not folder.exists():
            unpack_package(package, fetch_package(package, self.downloads), folder)
        return folder


def collect_pictures(
    sources: list[str], packages: PackageFolder, photographs: Path | None, report: Report
) -> list[Picture]:
    """
    List the pictures of the sources asked for.

    Args:
        sources (`list[str]`):
            Names from `SOURCES`.
        packages (`PackageFolder`):
            Where packages come from.
        photographs (`Path`, *optional*):
            The folder of photographs, needed for the source `photographs`.
        report (`Report`):
            Takes the counts of what was left out.

    Returns:
        `list[Picture]`: The pictures.

    Raises:
        PackageError: If a package could not be fetched, or a source gives no picture at all.
    """
    overrides = CaptionOverrides.load()
    found: dict[str, tuple[list[Picture], Counter[str]]] = {}
    if "stamps" in sources:
        found["stamps"] = stamp_pictures(packages.unpacked(STAMPS), overrides)
    if "fluent-emoji" in sources:
        records = read_emoji_records(packages.unpacked(GOOGLE_EMOJI))
        folder = packages.unpacked(FLUENT_EMOJI) / "package" / "assets"
        found["fluent-emoji"] = emoji_pictures("fluent-emoji-3d", records, folder, ".webp", overrides)
    if "google-emoji" in sources:
        unpacked = packages.unpacked(GOOGLE_EMOJI)
        folder = unpacked / "package" / "img" / "google" / "64"
        records = read_emoji_records(unpacked)
        found["google-emoji"] = emoji_pictures("emoji-google", records, folder, ".png", overrides)
    if "photographs" in sources and photographs is not None:
        found["photographs"] = photograph_pictures(photographs, overrides)
    for source, (pictures, skipped) in found.items():
        report.skipped.update(skipped)
        if not pictures:
            raise PackageError(
                f"the source {source} gave no picture, expected hundreds: its folder or package is not laid out as it "
                f"was when this was written. Check it, or leave it out with --sources. Skipped: {dict(skipped)}"
            )
    return [picture for pictures, _ in found.values() for picture in pictures]


def picture_views(picture: Picture, views: int, backgrounds: list[Image.Image], seed: int) -> list[Image.Image]:
    """The views of one picture. They depend on the picture's name and the seed, not on what else is in the data."""
    rng = random.Random(f"{seed}/{picture.source}/{picture.name}")
    with Image.open(picture.path) as image:
        image.load()
        if picture.split == "heldout":
            return [on_white(image)]
        if picture.is_cutout:
            return cutout_views(image, views, picture.mirrorable, backgrounds, rng)
        return photograph_views(image, views, picture.mirrorable, rng)


def generate_rows(
    pictures: list[Picture], views: int, backgrounds: list[Image.Image], seed: int, report: Report
) -> Iterator[dict]:
    """Yield the dataset's rows and count them in the report. A picture that cannot be read is counted and left out."""
    for picture in tqdm(pictures, desc="Drawing views", unit="picture"):
        try:
            images = picture_views(picture, views, backgrounds, seed)
        except (OSError, SyntaxError, ValueError):  # what Pillow raises for damaged files
            report.skipped[f"picture of {picture.source} cannot be read"] += 1
            continue
        report.pictures[picture.split, picture.source] += 1
        report.rows[picture.split, picture.source] += len(images)
        for view, image in enumerate(images):
            yield {
                "image": {"bytes": encode_jpeg(image), "path": None},
                "caption": picture.caption_of_view(view),
                "source": picture.source,
                "split": picture.split,
                "name": picture.name,
            }


def encode_jpeg(image: Image.Image) -> bytes:
    """The picture as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def build_dataset(options: argparse.Namespace, work: Path, report: Report) -> datasets.DatasetDict:
    """
    Fetch the sources and build the dataset inside a working folder.

    Args:
        options (`argparse.Namespace`):
            The command line.
        work (`Path`):
            Where packages are unpacked and Arrow files are written.
        report (`Report`):
            Takes all counts.

    Returns:
        `datasets.DatasetDict`: The dataset, backed by files in `work`.

    Raises:
        PackageError: If a package could not be fetched.
    """
    packages = PackageFolder(work, options.downloads)
    pictures = collect_pictures(options.sources, packages, options.photographs, report)
    backgrounds = [] if options.plain_backgrounds else read_backgrounds(packages.unpacked(BACKGROUNDS))

    def build_split(split: str) -> datasets.Dataset:
        chosen = [picture for picture in pictures if picture.split == split]
        # With a fingerprint given, the pictures and backgrounds are not pickled to compute one.
        return datasets.Dataset.from_generator(
            lambda: generate_rows(chosen, options.views, backgrounds, options.seed, report),
            features=FEATURES,
            cache_dir=str(work / "arrow"),
            fingerprint=f"minigpt4-tiny-{split}",
        )

    # `load_from_disk` cannot read a split without rows, which `heldout` is where no stamps are asked for.
    present = {picture.split for picture in pictures}
    return datasets.DatasetDict({split: build_split(split) for split in SPLITS if split in present})


def write_output(options: argparse.Namespace) -> Report:
    """
    Build the dataset beside its place and move it there when it is whole.

    Args:
        options (`argparse.Namespace`):
            The command line.

    Returns:
        `Report`: What went into it.

    Raises:
        PackageError: If a package could not be fetched.
        OSError: If the output cannot be written.
    """
    output: Path = options.output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.with_name(f".{output.name}.incomplete")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        report = Report()
        dataset = build_dataset(options, work, report)
        dataset.save_to_disk(work / "dataset")
        content = {"seed": options.seed, "views": options.views, "sources": options.sources, **report.as_dict()}
        (work / "dataset" / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if output.exists():
            output.replace(work / "replaced")
        (work / "dataset").replace(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and refuse what cannot work before any work starts."""
    parser = argparse.ArgumentParser(description="Prepare the tiny model's training data from public packages.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the dataset folder to write")
    parser.add_argument(
        "--photographs",
        type=Path,
        metavar="DIR",
        help="a folder of photographs named by ImageNet class, as n02123045_tabby.jpg. Without it there are none",
    )
    parser.add_argument(
        "--sources",
        nargs="+",
        choices=SOURCES,
        metavar="SOURCE",
        help=f"which of {', '.join(SOURCES)} to take. By default all, photographs only with --photographs",
    )
    parser.add_argument(
        "--views", type=int, default=5, metavar="N", help="views of each training picture (default: 5)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the views (default: 0)")
    parser.add_argument(
        "--downloads",
        type=Path,
        metavar="DIR",
        help="use the packages that are in this folder, and keep there those that are fetched (about 280 MB). By "
        "default they are deleted afterwards",
    )
    parser.add_argument("--plain-backgrounds", action="store_true", help="paste cut-outs on plain colours only")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    options = parser.parse_args(arguments)
    if options.sources is None:
        options.sources = [name for name in SOURCES if name != "photographs" or options.photographs is not None]
    check_arguments(parser, options)
    return options


def check_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with a message where the options cannot work."""
    if "photographs" in options.sources and options.photographs is None:
        parser.error("--sources photographs needs --photographs DIR, the folder that holds them")
    if options.photographs is not None and not options.photographs.is_dir():
        parser.error(
            f"--photographs got {options.photographs}, expected a folder of files like n02123045_tabby.jpg: clone "
            "github.com/EliSchwartz/imagenet-sample-images and pass its folder, or leave the option out"
        )
    if options.views < 1:
        parser.error(f"--views got {options.views}, expected 1 or more")
    if options.output.exists() and not options.overwrite:
        parser.error(f"--output {options.output} exists: choose another folder, or pass --overwrite to replace it")


def main(arguments: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    options = parse_arguments(arguments)
    datasets.disable_progress_bars()
    try:
        report = write_output(options)
    except (PackageError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        print(f"prepare_data.py: {error.__cause__ or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_data.py: interrupted; nothing half-made was left. Run it again to go on.", file=sys.stderr)
        return 130
    print(report.as_text())
    print(f"Wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
