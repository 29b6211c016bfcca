"""The tiny model, from files to sentences: real weights, real photographs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor, pipeline

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration


EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = EXAMPLES / "tiny" / "checkpoint" / "stage1"
PHOTOGRAPHS = EXAMPLES / "tiny" / "photographs"


@pytest.fixture(scope="module", autouse=True)
def backbones_are_built():
    subprocess.run([sys.executable, str(EXAMPLES / "tiny" / "build_backbones.py")], check=True)


@pytest.fixture(scope="module")
def pipe():
    return pipeline("image-to-text", model=str(CHECKPOINT))


def sentence(pipe, name, **kwargs):
    return pipe(str(PHOTOGRAPHS / f"{name}.jpg"), **kwargs)[0]["generated_text"]


def test_the_checkpoint_is_small_and_names_its_backbones():
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 8_000_000
    model = AutoModel.from_pretrained(CHECKPOINT)
    assert type(model) is MiniGPT4ForConditionalGeneration
    sources = {part: entry["source"] for part, entry in model.config.backbones.items()}
    assert sources == {"vision_tower": "cache:efficientnet-lite0", "language_model": "cache:smollm2-135m-instruct"}
    assert (model.config.image_seq_length, model.config.projection_in_features) == (16, 5120)
    assert model.dtype == torch.bfloat16
    assert model.model.multi_modal_projector.weight.dtype == torch.float32


LIVING = {"animal", "bee", "bird", "butterfly", "flower", "leaf", "mammal", "plant"}


def living_words(pipe):
    """Which of the photographs are spoken of as something that lives."""
    sentences = {name: sentence(pipe, name, max_new_tokens=32) for name in ("coffee", "dandelions", "raccoon")}
    return {name for name, one in sentences.items() if LIVING & set(re.findall("[a-z]+", one.lower()))}


def test_what_lives_is_told_from_what_does_not(pipe):
    assert living_words(pipe) == {"dandelions", "raccoon"}


def test_an_untrained_projection_tells_nothing_apart(pipe):
    model = AutoModel.from_pretrained(CHECKPOINT)
    torch.manual_seed(0)
    model.init_projection()
    assert not living_words(pipeline("image-to-text", model=model, processor=pipe.processor))


def test_the_picture_and_not_the_prompt_makes_the_sentence():
    """Swapped pictures swap the sentences: the images of a batch are not mixed up. In float32, where batches agree."""
    pipe = pipeline("image-to-text", model=str(CHECKPOINT), dtype=torch.float32)
    paths = [str(PHOTOGRAPHS / f"{name}.jpg") for name in ("cat", "coffee")]
    answers = [one[0]["generated_text"] for one in pipe(paths)]
    assert [one[0]["generated_text"] for one in pipe(paths[::-1])] == answers[::-1]
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    prompts = [processor.image_prompt()] * 2
    inputs = processor(images=paths, text=prompts, add_special_tokens=False, return_tensors="pt")
    stops = [*pipe.model.generation_config.eos_token_id, *processor.caption_end_ids]
    generated = pipe.model.generate(**inputs, max_new_tokens=32, eos_token_id=stops)
    assert processor.post_process_image_text_to_text(generated[:, inputs["input_ids"].shape[1] :]) == answers


def test_a_conversation_about_a_photograph_runs_to_its_end_symbol(pipe):
    answer = sentence(pipe, "cat", text="What animal is in the picture?", max_new_tokens=60)
    assert answer
    assert "<|im_" not in answer
    assert "<ImageHere>" not in answer


def test_opening_it_never_holds_two_copies_of_a_backbone():
    """Peak memory over the level after import, against the size of the weights."""
    code = (
        "import resource, modeling_minigpt4\n"
        "from transformers import AutoModel\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        f"model = AutoModel.from_pretrained({str(CHECKPOINT)!r})\n"
        "size = sum(weight.numel() * weight.element_size() for weight in model.parameters())\n"
        "print(size, peak() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size, grown = map(int, run.stdout.split())
    assert size > 270_000_000
    assert grown < 1.3 * size
