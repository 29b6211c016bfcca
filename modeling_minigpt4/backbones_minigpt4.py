"""Where the frozen parts of a MiniGPT-4 come from: a repository, a folder, or a folder of the MiniGPT-4 cache."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """The folder that `cache:NAME` entries are resolved under.

    Returns:
        `Path`: `$MINIGPT4_CACHE`, or `$XDG_CACHE_HOME/minigpt4` (`~/.cache/minigpt4`) where that is not set.
    """
    if configured := os.environ.get("MINIGPT4_CACHE"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "minigpt4"
