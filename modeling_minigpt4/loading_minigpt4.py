"""Which arguments of `from_pretrained` hold for a checkpoint, and which for each of its frozen parts."""

import copy
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from .backbones_minigpt4 import Backbone
from .configuration_minigpt4 import MiniGPT4Config


# Arguments that say where a checkpoint lies.
CHECKPOINT_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def backbone_hub_kwargs(hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of `CHECKPOINT_KWARGS`, those that hold for the backbones too, which lie elsewhere."""
    return {name: value for name, value in hub_kwargs.items() if name not in ("revision", "subfolder")}


def device_key(device: torch.device | int | str) -> int | str:
    """A device as device maps write it: the index of an accelerator, `"cpu"` or `"disk"`."""
    if not isinstance(device, torch.device):
        return device
    return device.type if device.index is None else device.index


def merge_backbones(entries: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The entries of `config.backbones`, some of them replaced.

    Raises:
        `ValueError`: If there is no such part.
    """
    if unknown := overrides.keys() - entries.keys():
        raise ValueError(f"`backbones` names {sorted(unknown)}. Expected some of {sorted(entries)}.")
    return {part: Backbone.from_entry(part, overrides.get(part, entry)).to_entry() for part, entry in entries.items()}


def part_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments of `from_pretrained`, those that each part is opened with.

    Raises:
        `ValueError`: If there are others.
    """
    passed = ("attn_implementation", "device_map", "dtype", "max_memory", "offload_folder", "quantization_config")
    ignored = (  # by transformers too, or without meaning here
        "_commit_hash",
        "_from_auto",
        "_from_pipeline",
        "adapter_kwargs",
        "low_cpu_mem_usage",
        "trust_remote_code",
        "use_safetensors",
        "weights_only",
    )
    if unknown := kwargs.keys() - {*passed, *ignored}:
        raise ValueError(
            f"Frozen parts cannot be opened with {sorted(unknown)}. Expected some of {passed}; a full checkpoint, as "
            "`save_pretrained` writes it, takes the others too."
        )
    return {name: kwargs[name] for name in passed if kwargs.get(name) is not None}


def quantize_language_model_only(quantization_config: Any) -> Any:
    """A quantization of a whole checkpoint that spares the vision side and the projection, unless it says itself what
    to spare.

    Args:
        quantization_config (`QuantizationConfigMixin`): As the user gave it; it is not changed.

    Raises:
        `ValueError`: If it is a dictionary.
    """
    if not isinstance(quantization_config, QuantizationConfigMixin):
        raise ValueError(
            f"Got the quantization_config {quantization_config!r}. Expected an object, such as "
            "`BitsAndBytesConfig(load_in_4bit=True)`."
        )
    config = copy.deepcopy(quantization_config)
    parts = ("vision_tower", "qformer", "multi_modal_projector")
    spared = ["lm_head", *parts, *(f"model.{part}" for part in parts)]
    for name in (
        "llm_int8_skip_modules",
        "modules_to_not_convert",
        "skip_modules",
    ):  # each kind has its own name for it
        if name in vars(config) and not vars(config)[name]:
            setattr(config, name, spared)
    return config


def requested_attention(config: MiniGPT4Config) -> str | dict[str, str] | None:
    """The `attn_implementation` that the Auto classes have put into a configuration."""
    if config._attn_implementation is not None:
        return config._attn_implementation
    parts = {
        "vision_config": config.vision_config,
        "qformer_config": config.qformer_config,
        "text_config": config.text_config,
    }
    chosen = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    return {name: attention for name, attention in chosen.items() if attention is not None} or None


def kwargs_of_part(sub_config: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that one part is opened with: its own attention; quantization is for the language model only."""
    kwargs = dict(kwargs)
    attention = kwargs.pop("attn_implementation", None)
    if isinstance(attention, dict):
        attention = attention.get(sub_config)
    elif sub_config != "text_config" and attention != "eager":
        attention = None  # convolutions have no attention, and the Q-Former no flash attention
    if attention is not None:
        kwargs["attn_implementation"] = attention
    if sub_config != "text_config":
        kwargs.pop("quantization_config", None)
    if isinstance(kwargs.get("device_map"), dict):
        kwargs["device_map"] = _device_map_of_part(sub_config, kwargs["device_map"])
    return kwargs


def _device_map_of_part(sub_config: str, device_map: dict[str, Any]) -> dict[str, Any] | None:
    """The device of one part, from a map that names parts, or `""` for all of them."""
    part = {"vision_config": "vision_tower", "qformer_config": "qformer", "text_config": "language_model"}[sub_config]
    names = {name.removeprefix("model."): device for name, device in device_map.items()}
    known = {"", "vision_tower", "qformer", "query_tokens", "multi_modal_projector", "language_model", "lm_head"}
    if finer := names.keys() - known:
        raise ValueError(
            f"Got a device_map with {sorted(finer)}. Expected whole parts, such as `model.language_model`: the parts "
            'of a projection-only checkpoint are opened one by one. Take "auto", or save the whole model.'
        )
    device = names.get(part, names.get(""))
    return None if device is None else {"": device}
