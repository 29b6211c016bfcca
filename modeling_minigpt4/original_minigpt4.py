"""The files of the original release: what their tensors are called in transformers, and the sizes that they imply."""

import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel, PreTrainedModel


# Widths of an attention head in the release, whatever the width of the model.
_VISION_HEAD_SIZE = 88
_QFORMER_HEAD_SIZE = 64
# The whole ViT-g of EVA-CLIP has 40 blocks. BLIP-2 leaves out the last one, which its file may hold all the same.
_VIT_G_WIDTH, _VIT_G_BLOCKS = 1408, 40

_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}
_BLOCK_NAMES = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_ATTENTION_NAMES = {
    "self.query": "attention.query",
    "self.key": "attention.key",
    "self.value": "attention.value",
    "output.dense": "output.dense",
    "output.LayerNorm": "output.LayerNorm",
}
_FEED_FORWARD_NAMES = ("intermediate_query.dense", "output_query.dense", "output_query.LayerNorm")

# What the released files hold besides, and no image passes through.
_UNUSED_IN_VISION = re.compile(r"(norm|fc_norm|head)\.(weight|bias)")
_UNUSED_IN_QFORMER = re.compile(
    r"(t5_proj|opt_proj|llm_proj|vision_proj|text_proj|itm_head)\.(weight|bias)|temp|Qformer\.cls\..*"
    r"|Qformer\.bert\.embeddings\.(position_ids|(word|position|token_type)_embeddings\.weight)"
    r"|Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*"  # the feed-forward of texts
)
# Buffers that the original's trainer saved along with what was trained.
_UNUSED_IN_CHECKPOINT = re.compile(r"(.*\.)?rotary_emb\.inv_freq|Qformer\.bert\.embeddings\.position_ids")
_LORA = re.compile(r"(?:llama_model\.)?base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])(?:\.default)?\.weight")


@dataclass
class OriginalFile:
    """What a file of the original release holds, under the names of transformers.

    Args:
        tensors (`dict[str, torch.Tensor]`): Its tensors.
        problems (`list[str]`): A line for each tensor that is missing, unexpected or of a wrong shape.
        unused (`list[str]`): The tensors that no image passes through.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


@dataclass
class OriginalQFormer(OriginalFile):
    """The Q-Former's file, which also holds the query tokens and the layer norm behind the vision encoder.

    Args:
        config ([`~transformers.Blip2QFormerConfig`]): The sizes of the Q-Former.
        query_tokens (`torch.Tensor` of shape `(1, num_query_tokens, hidden_size)`): The learned queries.
        layer_norm (`dict[str, torch.Tensor]`): `ln_vision`, under its names in the vision encoder.
    """

    config: Blip2QFormerConfig | None = None
    query_tokens: torch.Tensor | None = None
    layer_norm: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class OriginalCheckpoint(OriginalFile):
    """A checkpoint of MiniGPT-4 or MiniGPT-v2: `tensors` are those of the projection.

    Args:
        lora (`dict[str, dict[str, torch.Tensor]]`): Matrices `"A"` and `"B"` by the name of the language model's
            module that they belong to.
    """

    lora: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def read_vision_encoder(path: str | Path) -> tuple[Blip2VisionConfig, OriginalFile]:
    """Reads `eva_vit_g.pth`.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `tuple[Blip2VisionConfig, OriginalFile]`: The sizes, read off the tensors, and the tensors, without the layer
        norm behind the encoder, which is in the Q-Former's file.

    Raises:
        `OSError`: If the file cannot be opened.
        `ValueError`: If it is no vision encoder of the release.
    """
    weights = read_weights(path)
    position = _required(weights, "pos_embed", path, 3)
    patch = _required(weights, "patch_embed.proj.weight", path, 4)
    hidden_size, patch_size = position.shape[-1], patch.shape[-1]
    depth = _count_layers(weights, r"blocks\.(\d+)\.", path)
    if (hidden_size, depth) == (_VIT_G_WIDTH, _VIT_G_BLOCKS):
        depth -= 1
    grid = round((position.shape[1] - 1) ** 0.5)
    if grid**2 + 1 != position.shape[1] or hidden_size % _VISION_HEAD_SIZE:
        raise ValueError(
            f"The `pos_embed` in {path} has the shape {tuple(position.shape)}. Expected (1, 1 + n², "
            f"{_VISION_HEAD_SIZE} · heads): a class token and a square grid of patches."
        )
    config = Blip2VisionConfig(
        hidden_size=hidden_size,
        intermediate_size=_required(weights, "blocks.0.mlp.fc1.weight", path, 2).shape[0],
        num_hidden_layers=depth,
        num_attention_heads=hidden_size // _VISION_HEAD_SIZE,
        image_size=grid * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )
    unused = [name for name in weights if _UNUSED_IN_VISION.fullmatch(name) or name.startswith(f"blocks.{depth}.")]
    missing = [
        name for layer in range(depth) for name in _join_qkv_bias(weights, f"blocks.{layer}.attn.", hidden_size)
    ]
    file = _rename(path, weights, vision_names(depth), unused, Blip2VisionModel, config, left_out="post_layernorm.")
    file.problems += [f"{path}: missing {name}" for name in missing]
    return config, file


def read_qformer(path: str | Path) -> OriginalQFormer:
    """Reads `blip2_pretrained_flant5xxl.pth`.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        [`OriginalQFormer`]: The Q-Former, its query tokens and `ln_vision`.

    Raises:
        `OSError`: If the file cannot be opened.
        `ValueError`: If it holds no Q-Former of the release.
    """
    weights = read_weights(path)
    layers = "Qformer.bert.encoder.layer"
    query_tokens = _required(weights, "query_tokens", path, 3)
    cross_attention = sorted(
        int(match[1])
        for name in weights
        if (match := re.fullmatch(rf"{layers}\.(\d+)\.crossattention\.self\.key\.weight", name))
    )
    depth, hidden_size = _count_layers(weights, rf"{layers}\.(\d+)\.", path), query_tokens.shape[-1]
    if not cross_attention or hidden_size % _QFORMER_HEAD_SIZE:
        raise ValueError(
            f"The Q-Former in {path} has cross-attention in the layers {cross_attention} and the width {hidden_size}. "
            f"Expected cross-attention in some, and a multiple of {_QFORMER_HEAD_SIZE}."
        )
    frequency = cross_attention[1] - cross_attention[0] if len(cross_attention) > 1 else depth
    config = Blip2QFormerConfig(
        hidden_size=hidden_size,
        num_hidden_layers=depth,
        num_attention_heads=hidden_size // _QFORMER_HEAD_SIZE,
        intermediate_size=_required(weights, f"{layers}.0.intermediate_query.dense.weight", path, 2).shape[0],
        encoder_hidden_size=_required(
            weights, f"{layers}.{cross_attention[0]}.crossattention.self.key.weight", path, 2
        ).shape[1],
        cross_attention_frequency=frequency,
        layer_norm_eps=1e-12,
    )
    unused = [name for name in weights if _UNUSED_IN_QFORMER.fullmatch(name)]
    own = {"query_tokens", "ln_vision.weight", "ln_vision.bias"}
    qformer = {name: weight for name, weight in weights.items() if name not in own}
    file = _rename(path, qformer, qformer_names(depth, cross_attention), unused, Blip2QFormerModel, config)
    layer_norm = {kind: weights[f"ln_vision.{kind}"] for kind in ("weight", "bias") if f"ln_vision.{kind}" in weights}
    missing = [f"{path}: missing ln_vision.{kind}" for kind in ("weight", "bias") if kind not in layer_norm]
    misshapen = [
        f"{path}: ln_vision.{kind} has the shape {tuple(weight.shape)}, expected ({config.encoder_hidden_size},)"
        for kind, weight in layer_norm.items()
        if tuple(weight.shape) != (config.encoder_hidden_size,)
    ]
    return OriginalQFormer(
        tensors=file.tensors,
        problems=file.problems + missing + misshapen,
        unused=file.unused,
        config=config,
        query_tokens=query_tokens,
        layer_norm={f"post_layernorm.{kind}": weight for kind, weight in layer_norm.items()},
    )


def read_checkpoint(path: str | Path) -> OriginalCheckpoint:
    """Reads a checkpoint of MiniGPT-4 or MiniGPT-v2: the projection, and LoRA matrices where there are some.

    Args:
        path (`str` or `Path`): The file.

    Raises:
        `OSError`: If the file cannot be opened.
        `ValueError`: If it holds no projection.
    """
    weights = read_weights(path)
    checkpoint = OriginalCheckpoint()
    width = _required(weights, "llama_proj.weight", path, 2).shape[0]
    for name, weight in weights.items():
        if name in ("llama_proj.weight", "llama_proj.bias"):
            checkpoint.tensors[name.removeprefix("llama_proj.")] = weight
        elif _UNUSED_IN_CHECKPOINT.fullmatch(name):
            checkpoint.unused.append(name)
        elif match := _LORA.fullmatch(name):
            checkpoint.lora.setdefault(match["module"], {})[match["matrix"]] = weight
        else:
            checkpoint.problems.append(f"{path}: unexpected {name}")
    if "bias" not in checkpoint.tensors:
        checkpoint.problems.append(f"{path}: missing llama_proj.bias")
    elif tuple(checkpoint.tensors["bias"].shape) != (width,):
        received = tuple(checkpoint.tensors["bias"].shape)
        checkpoint.problems.append(f"{path}: llama_proj.bias has the shape {received}, expected ({width},)")
    for module, matrices in checkpoint.lora.items():
        if absent := {"A", "B"} - matrices.keys():
            checkpoint.problems.append(f"{path}: missing lora_{absent.pop()} of {module}")
    return checkpoint


def check_lora(path: str | Path, checkpoint: OriginalCheckpoint, language_model: PreTrainedModel) -> list[str]:
    """What does not fit between LoRA matrices and a language model, a line for each.

    Args:
        path (`str` or `Path`): The checkpoint's file.
        checkpoint ([`OriginalCheckpoint`]): What it holds.
        language_model ([`~transformers.PreTrainedModel`]): The language model; a meta device will do.
    """
    shapes = {name: tuple(weight.shape) for name, weight in language_model.named_parameters()}
    problems = []
    for module, matrices in checkpoint.lora.items():
        expected = shapes.get(f"{module}.weight")
        if expected is None:
            problems.append(f"{path}: LoRA matrices for {module}, which the language model does not have")
        elif any(matrix.ndim != 2 for matrix in matrices.values()):
            problems.append(f"{path}: a LoRA matrix of {module} has {[m.ndim for m in matrices.values()]} dimensions")
        elif matrices.keys() == {"A", "B"}:
            received = (matrices["B"].shape[0], matrices["A"].shape[1])
            if received != expected or matrices["A"].shape[0] != matrices["B"].shape[1]:
                problems.append(
                    f"{path}: lora_A {tuple(matrices['A'].shape)} and lora_B {tuple(matrices['B'].shape)} of "
                    f"{module}, whose weight has the shape {expected}"
                )
    return problems


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Opens a pickle of tensors, without running what else it may hold.

    Args:
        path (`str` or `Path`): The file. A `"model"` in it is unwrapped.

    Raises:
        `OSError`: If there is no such file.
        `ValueError`: If it is no pickle of tensors.
    """
    if not Path(path).is_file():
        raise OSError(f"There is no file {path}.")
    try:
        content = _load_pickle(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be opened: {reason} Expected a file of the original release, a pickle of tensors "
            "(`torch.load(..., weights_only=True)`). Is the download complete?"
        ) from error
    weights = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise ValueError(f"{path} holds a {type(weights).__name__}. Expected a dictionary of tensors.")
    return dict(weights)


def _load_pickle(path: str | Path) -> Any:
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"  # the format before torch 1.6 cannot be mapped into memory
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _required(weights: dict[str, torch.Tensor], name: str, path: str | Path, ndim: int) -> torch.Tensor:
    if name not in weights:
        raise ValueError(
            f"{path} has no tensor `{name}`, which tells its sizes. It holds {len(weights)} others: "
            f"{', '.join(list(weights)[:5])}{', ...' if len(weights) > 5 else ''}. Is it the right file?"
        )
    if weights[name].ndim != ndim:
        raise ValueError(f"{path}: {name} has the shape {tuple(weights[name].shape)}, expected {ndim} dimensions.")
    return weights[name]


def _count_layers(weights: dict[str, torch.Tensor], pattern: str, path: str | Path) -> int:
    layers = [int(match[1]) for name in weights if (match := re.match(pattern, name))]
    if not layers:
        raise ValueError(f"{path} has no tensor named like `{pattern}`. Is it the right file?")
    return max(layers) + 1


def _join_qkv_bias(weights: dict[str, torch.Tensor], prefix: str, size: int) -> list[str]:
    """Makes one bias of two: that of the keys is zero, and is not in the file. Returns those that are missing."""
    biases = {name: weights.pop(f"{prefix}{name}", None) for name in ("q_bias", "v_bias")}
    query, value = (torch.zeros(size) if bias is None else bias for bias in biases.values())
    weights[f"{prefix}qkv.bias"] = torch.cat([query, torch.zeros(size, dtype=query.dtype), value])
    return [f"{prefix}{name}" for name, bias in biases.items() if bias is None]


def vision_names(depth: int) -> dict[str, str]:
    """The names of a vision encoder's tensors in transformers, by the original's. The biases of queries and values,
    which are two tensors there, count as one `attn.qkv.bias`."""
    names = dict(_VISION_NAMES)
    for layer in range(depth):
        block, here = f"blocks.{layer}.", f"encoder.layers.{layer}."
        names |= {f"{block}attn.qkv.{kind}": f"{here}self_attn.qkv.{kind}" for kind in ("weight", "bias")}
        names |= {
            f"{block}{old}.{kind}": f"{here}{new}.{kind}"
            for old, new in _BLOCK_NAMES.items()
            for kind in ("weight", "bias")
        }
    return names


def qformer_names(depth: int, cross_attention: list[int]) -> dict[str, str]:
    """The same of a Q-Former, which has cross-attention in some layers."""
    pairs = {"embeddings.LayerNorm": "layernorm"}
    for layer in range(depth):
        attentions = ["attention", "crossattention"] if layer in cross_attention else ["attention"]
        for attention in attentions:
            prefix = f"encoder.layer.{layer}.{attention}."
            pairs |= {f"{prefix}{old}": f"{prefix}{new}" for old, new in _ATTENTION_NAMES.items()}
        pairs |= {f"encoder.layer.{layer}.{name}": f"encoder.layer.{layer}.{name}" for name in _FEED_FORWARD_NAMES}
    return {f"Qformer.bert.{old}.{kind}": f"{new}.{kind}" for old, new in pairs.items() for kind in ("weight", "bias")}


def _rename(
    path: str | Path,
    weights: dict[str, torch.Tensor],
    names: dict[str, str],
    unused: list[str],
    model_class: type[PreTrainedModel],
    config: Any,
    left_out: str = "",
) -> OriginalFile:
    """Renames tensors, and compares them with those of a model of these sizes.

    Args:
        names: The names in transformers by the original's.
        left_out: Prefix of tensors that the model has and the file has not.
    """
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in model_class(config).state_dict().items()}
    used = {name: weight for name, weight in weights.items() if name not in unused}
    problems = [f"{path}: missing {name}" for name in names if name not in used]
    problems += [f"{path}: unexpected {name}" for name in used if name not in names]
    tensors = {names[name]: weight for name, weight in used.items() if name in names}
    problems += [
        f"{path}: {name} has the shape {tuple(used[name].shape)}, expected {expected[new]}"
        for name, new in names.items()
        if name in used and tuple(used[name].shape) != expected.get(new)
    ]
    uncovered = expected.keys() - set(names.values())
    if any(not left_out or not name.startswith(left_out) for name in uncovered):
        raise ValueError(f"{model_class.__name__} has tensors that no file of the release gives: {sorted(uncovered)}.")
    return OriginalFile(tensors, problems, unused)
