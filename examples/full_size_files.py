"""Writes random weights at the full size of the original release, to measure the conversion with.

```shell
python examples/full_size_files.py --tokenizer tests/fixtures/original/llm --output full-size
python -m modeling_minigpt4.convert_minigpt4_original_to_hf --vision-encoder full-size/eva_vit_g.pth \\
    --qformer full-size/blip2_pretrained_flant5xxl.pth --checkpoint full-size/checkpoint.pth \\
    --language-model full-size/llm --prompt-style vicuna-v0 --dtype bfloat16 --output converted
```

They take 16 GB, all in float16: ViT-g of 39 layers, the Q-Former of 12, and a LLaMA of 7B in shards.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import Blip2QFormerModel, Blip2VisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_minigpt4 import MiniGPT4Config
from modeling_minigpt4.original_minigpt4 import qformer_names, vision_names


TENSORS_IN_A_SHARD = 30


def random_weights(model: PreTrainedModel, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Random tensors of the shapes of a model, under the original's names."""
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    return {old: torch.randn(shapes[new], dtype=torch.float16) * 0.02 for old, new in names.items()}


def split_qkv_bias(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The biases of queries and values, as the original's files have them."""
    split = {}
    for name, weight in weights.items():
        if name.endswith("attn.qkv.bias"):
            query, _, value = weight.chunk(3)
            prefix = name.removesuffix("qkv.bias")
            split |= {f"{prefix}q_bias": query.clone(), f"{prefix}v_bias": value.clone()}
        else:
            split[name] = weight
    return split


def write_vision_side(config: MiniGPT4Config, output: Path) -> None:
    """The two files of the vision side."""
    with torch.device("meta"):
        vision_tower, qformer = Blip2VisionModel(config.vision_config), Blip2QFormerModel(config.qformer_config)
    weights = random_weights(vision_tower, vision_names(config.vision_config.num_hidden_layers))
    torch.save(split_qkv_bias(weights), output / "eva_vit_g.pth")
    depth = config.qformer_config.num_hidden_layers
    cross_attention = list(range(0, depth, config.qformer_config.cross_attention_frequency))
    weights = random_weights(qformer, qformer_names(depth, cross_attention))
    width = config.vision_config.hidden_size
    weights |= {"ln_vision.weight": torch.ones(width), "ln_vision.bias": torch.zeros(width)}
    weights["query_tokens"] = torch.randn(1, config.num_query_tokens, config.qformer_config.hidden_size)
    torch.save({"model": weights}, output / "blip2_pretrained_flant5xxl.pth")


def write_language_model(config: LlamaConfig, tokenizer: Path, folder: Path) -> None:
    """The language model, a shard at a time."""
    folder.mkdir()
    with torch.device("meta"):
        shapes = [(name, weight.shape) for name, weight in LlamaForCausalLM(config).state_dict().items()]
    weight_map = {}
    for start in tqdm(range(0, len(shapes), TENSORS_IN_A_SHARD), desc="Writing the language model", unit="shard"):
        shard = f"model-{start:05}.safetensors"
        part = shapes[start : start + TENSORS_IN_A_SHARD]
        save_file({name: torch.randn(shape).mul_(0.02).half() for name, shape in part}, folder / shard)
        weight_map |= {name: shard for name, _ in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a LLaMA tokenizer")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"--output {options.output} exists. Expected a new folder.")
    options.output.mkdir(parents=True)
    config = MiniGPT4Config()
    write_vision_side(config, options.output)
    write_language_model(LlamaConfig(dtype="float16"), options.tokenizer, options.output / "llm")
    projection = {"llama_proj.weight": torch.randn(4096, 768), "llama_proj.bias": torch.zeros(4096)}
    torch.save({"model": projection}, options.output / "checkpoint.pth")


if __name__ == "__main__":
    main()
