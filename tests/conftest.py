"""Backbones that are made in a moment: random weights, real formats."""

import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import PIL.Image
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from processing import MiniGPT4Processor, build_processor, configure_generation
from tests.recipes import RECIPES, build


FIXTURES = Path(__file__).parent / "fixtures"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with a small random backbone each, by name."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("backbones")
    vision = Blip2VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    vision.initializer_range = 0.2
    qformer = Blip2QFormerConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        encoder_hidden_size=32,
        initializer_range=0.2,
    )
    llama = LlamaConfig(
        vocab_size=1500,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    gpt2 = GPT2Config(
        vocab_size=400,
        n_embd=40,
        n_layer=2,
        n_head=2,
        n_positions=256,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    parts = {
        "blip2": Blip2ForConditionalGeneration(
            Blip2Config(vision_config=vision, qformer_config=qformer, text_config=llama, num_query_tokens=5)
        ),
        "vit": ViTModel(
            ViTConfig(
                hidden_size=20,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=32,
                patch_size=8,
                initializer_range=0.2,
            )
        ),
        "clip": CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=20,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=32,
                patch_size=8,
            )
        ),
        "resnet": ResNetModel(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic")
        ),
        "llama": LlamaForCausalLM(llama),
        "gpt2": GPT2LMHeadModel(gpt2),
    }
    with torch.no_grad():  # a Q-Former's queries are zeros before they are trained
        parts["blip2"].query_tokens.normal_()
    for name, model in parts.items():
        model.eval().save_pretrained(root / name)
    AutoTokenizer.from_pretrained(FIXTURES / "original" / "llm").save_pretrained(root / "llama")
    _add_legacy_flag(root / "llama")
    _byte_level_tokenizer().save_pretrained(root / "gpt2")
    return {name: str(root / name) for name in parts}


def _add_legacy_flag(folder: Path) -> None:
    """`save_pretrained` forgets it; LLaMA's own repositories have it."""
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace("{", '{\n  "legacy": true,', 1), encoding="utf-8")


def _byte_level_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|turn|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["A cat and a dog sit on the grass. What is in the picture?"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|turn|>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(params=list(RECIPES))
def recipe(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(backbones: dict[str, str], recipe: str) -> MiniGPT4ForConditionalGeneration:
    return build(backbones, recipe)


@pytest.fixture
def processor(backbones: dict[str, str], recipe: str, model: MiniGPT4ForConditionalGeneration) -> MiniGPT4Processor:
    """The processor of `model`, which is told where an answer ends."""
    _, text, _, style = RECIPES[recipe]
    processor = build_processor(
        backbones[text], model.config.image_seq_length, model.config.vision_config.image_size, style
    )
    configure_generation(model, processor)
    return processor


@pytest.fixture
def qformer_model(backbones: dict[str, str]) -> MiniGPT4ForConditionalGeneration:
    return build(backbones, "qformer")


@pytest.fixture
def qformer_processor(backbones: dict[str, str], qformer_model: MiniGPT4ForConditionalGeneration) -> MiniGPT4Processor:
    processor = build_processor(backbones["llama"], qformer_model.config.image_seq_length, 28, "vicuna-v0")
    configure_generation(qformer_model, processor)
    return processor


@pytest.fixture
def pictures() -> list[PIL.Image.Image]:
    """Three pictures that no encoder can confuse."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 256, (3, 40, 50, 3), generator=generator, dtype=torch.uint8).numpy()
    return [PIL.Image.fromarray(one) for one in noise]
