"""Saved folders bring their code along: `trust_remote_code=True` without the packages."""

import json
import os
import subprocess
import sys

import pytest
from transformers import pipeline

from processing import configure_generation
from tests.recipes import lines_of_ours


SCRIPT = """
import importlib.abc, json, sys

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_minigpt4", "processing"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
folder, picture = sys.argv[1:]

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
models = [cls.from_pretrained(folder, trust_remote_code=True) for cls in (AutoModel, AutoModelForImageTextToText)]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
answers = [
    pipeline(task, model=folder, trust_remote_code=True)(picture, max_new_tokens=6)[0]["generated_text"]
    for task in ("image-to-text", "image-text-to-text")
]
models[0].save_pretrained(folder + "-again")
processor.save_pretrained(folder + "-again")
pipe = pipeline("image-to-text", model=folder + "-again", trust_remote_code=True)
answers.append(pipe(picture, max_new_tokens=6)[0]["generated_text"])
names = [type(one).__name__ for one in (config, *models, processor, pipe)]
print(json.dumps({"names": names, "answers": answers}))
"""


@pytest.mark.parametrize("projection_only", [False, True])
def test_everything_loads_where_the_packages_are_not_installed(model, processor, pictures, tmp_path, projection_only):
    folder, picture = tmp_path / "saved", tmp_path / "picture.png"
    pictures[0].save(picture)
    configure_generation(model, processor)
    model.save_pretrained(folder, projection_only=projection_only)
    processor.save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(picture)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "TQDM_DISABLE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["names"] == [
        "MiniGPT4Config",
        *["MiniGPT4ForConditionalGeneration"] * 2,
        "MiniGPT4Processor",
        "MiniGPT4Pipeline",
    ]
    here = pipeline("image-to-text", model=str(folder))(str(picture), max_new_tokens=6)[0]["generated_text"]
    assert result["answers"] == [here] * 3
    assert not lines_of_ours(done.stderr)


def test_with_the_packages_the_local_code_is_used_and_nothing_is_asked(model, processor, pictures, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("image-to-text", model=str(tmp_path))
    assert type(pipe).__module__ == "modeling_minigpt4.pipeline_minigpt4"
    assert type(pipe.model).__module__ == "modeling_minigpt4.modeling_minigpt4"
    assert type(pipe.processor).__module__ == "processing.processing_minigpt4"
