"""The scripts, as a user runs them: in processes of their own, on small random backbones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from tests.recipes import build


EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script, *arguments, status=0):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """One colour, one word: what a projection can learn in a moment."""
    import PIL.Image

    folder = tmp_path_factory.mktemp("captions")
    colours = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}
    rows = {
        "image": [PIL.Image.new("RGB", (32, 32), colour) for colour in colours.values()] * 4,
        "caption": [f"A {name}." for name in colours] * 4,
        "source": ["colours"] * 12,
    }
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict(train=dataset).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def config(captions, backbones, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "stage1.yaml"
    path.write_text(
        json.dumps(  # JSON is YAML
            {
                "vision_tower": backbones["vit"],
                "language_model": backbones["gpt2"],
                "dataset": str(captions),
                "source_weights": {"colours": 1.0},
                "dtype": "float32",
                "per_device_train_batch_size": 3,
                "learning_rate": 0.02,
                "lr_scheduler_type": "constant",
                "logging_steps": 1,
                "save_steps": 2,
                "max_steps": 4,
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
            }
        )
    )
    return path


def losses(output):
    lines = [line for line in output.splitlines() if line.startswith("{'loss'")]
    return [float(line.split("'loss': ")[1].split(",")[0].strip("'")) for line in lines]


def test_stage_1_trains_the_projection_and_nothing_else(config, backbones, tmp_path):
    done = run("train_stage1.py", "--config", config, "--output_dir", tmp_path, "--max_steps", 30, "--save_steps", 100)
    reference = build(backbones, "merged")
    total = sum(parameter.numel() for parameter in AutoModel.from_pretrained(tmp_path).parameters())
    assert f"Trainable parameters: {80 * 40 + 40:,} of {total:,}" in done.stdout
    found = losses(done.stdout)
    assert found[-1] < 0.8 * found[0]
    assert "'learning_rate'" in done.stdout
    assert "'examples_per_second'" in done.stdout
    assert sorted(load_file(tmp_path / "model.safetensors")) == [
        "model.multi_modal_projector.bias",
        "model.multi_modal_projector.weight",
    ]
    trained = AutoModel.from_pretrained(tmp_path)
    for name, weight in reference.model.vision_tower.state_dict().items():
        assert torch.equal(trained.model.vision_tower.state_dict()[name], weight)
    assert AutoProcessor.from_pretrained(tmp_path).default_instruction is None


@pytest.mark.parametrize("language_model", ["gpt2", "llama"])
def test_a_run_that_is_resumed_ends_as_one_that_was_not_interrupted(config, backbones, tmp_path, language_model):
    command = ["train_stage1.py", "--config", config, "--language_model", backbones[language_model]]
    command += ["--prompt_style", "native" if language_model == "gpt2" else "vicuna-v0", "--output_dir"]
    run(*command, tmp_path / "whole")
    run(*command, tmp_path / "halves", "--max_steps", 2)
    resumed = run(*command, tmp_path / "halves", "--resume_from_checkpoint", "true")
    assert len(losses(resumed.stdout)) == 2
    assert "missing keys" not in resumed.stderr
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves")]
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight)
    saved = load_file(tmp_path / "halves" / "checkpoint-2" / "model.safetensors")
    assert len(saved) == 2, "the projection alone"


def test_gradient_checkpointing_changes_no_weight(config, tmp_path):
    for name, extra in (("stored", []), ("recomputed", ["--gradient_checkpointing", "true"])):
        run("train_stage1.py", "--config", config, "--output_dir", tmp_path / name, *extra)
    stored, recomputed = (load_file(tmp_path / name / "model.safetensors") for name in ("stored", "recomputed"))
    for name, weight in stored.items():
        torch.testing.assert_close(recomputed[name], weight)


def test_the_final_projection_may_be_bfloat16(config, tmp_path):
    run("train_stage1.py", "--config", config, "--output_dir", tmp_path, "--max_steps", 1, "--save_dtype", "bfloat16")
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModel.from_pretrained(tmp_path).model.multi_modal_projector.weight.dtype == torch.float32


def test_training_refuses_to_start_where_anything_else_would_train(backbones):
    from projection_training import check_only_projection_trains

    model = build(backbones, "qformer")
    with pytest.raises(ValueError, match="parameters beside the projection would train"):
        check_only_projection_trains(model)
    model.freeze_backbones()
    check_only_projection_trains(model)
    model.model.query_tokens.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 parameters beside the projection would train \(model.query_tokens\)"):
        check_only_projection_trains(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="0 of the projection"):
        check_only_projection_trains(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "nowhere"], "error: There is no data set at nowhere"),
        (["--vision_tower", "cache:nothing"], "error: The backbone `vision_tower` is `cache:nothing`"),
        (["--prompt_style", "alpaca"], "error: Unknown prompt style 'alpaca'"),
        (["--token_merge_size", "5"], "error: The vision encoder gives 16 patch tokens"),
        (["--source_weights", '{"photographs": 1}'], "error: No row has the source"),
        (["--source_weights", "photographs"], "error: Got the source weights 'photographs'. Expected JSON"),
        (["--dtype", "bf16"], "error: Got the dtype 'bf16'. Expected one of bfloat16, float16, float32"),
        (["--save_dtype", "bf16"], "error: Got the dtype 'bf16'. Expected one of bfloat16, float16, float32"),
        (["--resume_from_checkpoint", "true"], "error: No valid checkpoint found"),
    ],
    ids=str,
)
def test_bad_arguments_end_with_one_line(config, tmp_path, arguments, message):
    done = run("train_stage1.py", "--config", config, "--output_dir", tmp_path, *arguments, status=1)
    assert message in done.stderr


@pytest.fixture
def checkpoint(backbones, tmp_path):
    from processing import build_processor, configure_generation

    model = build(backbones, "merged")
    processor = build_processor(backbones["llama"], 4, 32, "vicuna-v0")
    configure_generation(model, processor)
    model.save_pretrained(tmp_path / "checkpoint", projection_only=True)
    processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_every_readable_picture_gets_its_sentence(checkpoint, pictures, tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    paths = [tmp_path / "first.png", tmp_path / "torn.jpg", tmp_path / "second.png"]
    pictures[0].save(paths[0])
    pictures[1].save(paths[2])
    options = ["--model", checkpoint, "--max-new-tokens", 4]
    done = run("describe.py", *options, *paths, status=1)
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == [str(paths[0]), str(paths[2])]
    assert f"error: {paths[1]}: The picture {paths[1]} cannot be read" in done.stderr
    records = json.loads(run("describe.py", *options, "--json", *paths, status=1).stdout)
    assert [sorted(record) for record in records] == [["image", "text"], ["error", "image"], ["image", "text"]]
    asked = json.loads(run("describe.py", *options, "--json", "--prompt", "A cat?", paths[0]).stdout)
    assert asked[0]["text"] != records[0]["text"]


def test_a_missing_checkpoint_is_one_line(tmp_path):
    done = run("describe.py", "--model", tmp_path / "nothing", "picture.png", status=1)
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "script", ["describe.py", "train_stage1.py", "tiny/build_backbones.py", "tiny/prepare_data.py"]
)
def test_help_explains_itself(script):
    text = run(script, "--help").stdout
    assert "usage:" in text
    assert len(text.split()) > 60
