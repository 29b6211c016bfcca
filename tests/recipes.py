"""Models that the tests build of the backbones in `conftest.py`, and what they are asked."""

from pathlib import Path

import torch
import transformers
from packaging import version

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration


# Names of a model: which backbones it is made of, and its prompt style.
RECIPES = {
    "qformer": ("blip2", "llama", "blip2", "vicuna-v0"),
    "merged": ("vit", "llama", None, "llama-2"),
    "convolutional": ("resnet", "gpt2", None, "native"),
}

ORIGINAL = Path(__file__).parent / "fixtures" / "original"
# Variants of the original in `fixtures/original`, and their prompt styles.
ORIGINAL_STYLES = {"vicuna": "vicuna-v0", "llama2": "llama-2", "v2": "minigpt-v2"}


def original_files(variant: str) -> dict[str, str]:
    """The files of a variant, as arguments of the conversion."""
    files = {
        "checkpoint": str(ORIGINAL / variant / "checkpoint.pth"),
        "language_model": str(ORIGINAL / "llm"),
        "prompt_style": ORIGINAL_STYLES[variant],
        "vision_encoder": str(ORIGINAL / variant / "eva_vit_g.pth"),
    }
    qformer = ORIGINAL / variant / "blip2_pretrained_flant5xxl.pth"
    return files | ({"qformer": str(qformer)} if qformer.is_file() else {})


def lines_of_ours(stderr: str) -> list[str]:
    """What a process said, without progress bars and without what the pipeline of transformers 5.19 says about every
    model."""
    of_5_19 = ("Passing `generation_config` together with", "Both `max_new_tokens`")
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if line and "Loading weights" not in line]
    if version.parse(transformers.__version__) >= version.parse("5.20"):
        return lines
    return [line for line in lines if not any(known in line for known in of_5_19)]


def build(backbones: dict[str, str], recipe: str, **kwargs: object) -> MiniGPT4ForConditionalGeneration:
    vision, text, qformer, _ = RECIPES[recipe]
    torch.manual_seed(1)
    if vision == "resnet":
        kwargs.setdefault("image_size", 64)  # its configuration names none
    return MiniGPT4ForConditionalGeneration.from_backbones(
        backbones[vision], backbones[text], backbones[qformer] if qformer else None, **kwargs
    )


def question(text: str, count: int = 1) -> list[dict]:
    """A conversation with one user turn: some pictures, then text."""
    return [{"role": "user", "content": [*({"type": "image"} for _ in range(count)), {"type": "text", "text": text}]}]
