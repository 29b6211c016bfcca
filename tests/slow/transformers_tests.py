"""transformers' own common tests, from the source distribution of the installed release.

They are fetched with pip and kept in the cache folder; nothing of them is in this repository. What they import and the
distribution lacks is replaced by the smallest stand-ins.
"""

import importlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import PIL.Image
import transformers

from modeling_minigpt4.backbones_minigpt4 import cache_directory


PACKAGE = "transformers_tests"
# Generation tests, export tests and the keyword arguments of configurations stay behind in transformers' repository.
STAND_INS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {'return_dict': False, 'output_attentions': True}\n",
    "fetch_hub_objects_for_ci.py": (
        "from pathlib import Path\n\n"
        "def url_to_local_path(url):\n    return str(Path(__file__).with_name(url.rpartition('/')[2]))\n"
    ),
}
PICTURE = "coco_sample.png"  # instead of the one on the Hub; `fetch_hub_objects_for_ci` leads to it


def fetch() -> Path:
    """The folder that holds the package, fetched unless it is there."""
    version = transformers.__version__
    target = cache_directory() / f"transformers-tests-{version}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, f"transformers=={version}", "--dest", work], check=True)
        with tarfile.open(Path(work) / f"transformers-{version}.tar.gz") as archive:
            archive.extractall(work, filter="data")
        package = Path(work) / "root" / PACKAGE
        (Path(work) / f"transformers-{version}" / "tests").rename(_made(package.parent) / PACKAGE)
        for name, content in STAND_INS.items():
            (_made((package / name).parent) / Path(name).name).write_text(content, encoding="utf-8")
        PIL.Image.radial_gradient("L").convert("RGB").save(package / PICTURE)
        package.parent.rename(target)
    return target


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load(name: str) -> ModuleType:
    """One of the modules, such as `test_modeling_common`."""
    folder = fetch()
    for path in (folder, folder / PACKAGE):
        if str(path) not in sys.path:
            sys.path.append(str(path))
    return importlib.import_module(f"{PACKAGE}.{name}")
