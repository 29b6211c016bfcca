"""Where the frozen parts of a MiniGPT-4 come from, and how each is opened."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file


CACHE_PREFIX = "cache:"
ORIGINAL_PREFIX = "original-"  # of the vision sides that the conversion of original checkpoints puts into the cache
BUILD_TINY_BACKBONES = "python examples/tiny/build_backbones.py"

# In a repository that holds a whole model, the part is what stands behind this prefix. By `model_type`.
_PREFIXES = {
    "blip_2_vision_model": {"vision_tower": ""},
    "blip-2": {"vision_tower": "vision_model.", "qformer": "qformer.", "query_tokens": "query_tokens"},
    "minigpt4": {
        "vision_tower": "model.vision_tower.",
        "qformer": "model.qformer.",
        "query_tokens": "model.query_tokens",
    },
}


@dataclass(frozen=True)
class Backbone:
    """A source of one frozen part.

    Args:
        part (`str`): `"vision_tower"`, `"qformer"` or `"language_model"`.
        source (`str`): A repository, a folder, or `cache:NAME` for a folder below [`cache_directory`].
        revision (`str`, *optional*): Revision of the repository.
        gguf_file (`str`, *optional*): The GGUF file in it that holds a language model, which transformers reads.
    """

    part: str
    source: str
    revision: str | None = None
    gguf_file: str | None = None

    @classmethod
    def from_entry(cls, part: str, entry: "str | os.PathLike | dict[str, str] | Backbone") -> "Backbone":
        """From an entry of `config.backbones`, or from the plain name that a user gives instead."""
        if isinstance(entry, Backbone):
            return entry
        if isinstance(entry, (str, os.PathLike)):
            return cls(part, os.fspath(entry))
        if "source" not in entry or entry.keys() - {"source", "revision", "gguf_file"}:
            raise ValueError(
                f"The backbone entry for `{part}` is {entry}. Expected a repository, a folder or `cache:NAME`, or a "
                'dictionary {"source": ..., "revision": ..., "gguf_file": ...}.'
            )
        return cls(part, entry["source"], entry.get("revision"), entry.get("gguf_file"))

    def to_entry(self) -> dict[str, str]:
        """The entry of `config.backbones`."""
        optional = {"revision": self.revision, "gguf_file": self.gguf_file}
        return {"source": self.source} | {name: value for name, value in optional.items() if value}

    def where(self) -> dict[str, str | None]:
        """What `from_pretrained` needs to find it, beside the source."""
        return {"revision": self.revision} | ({"gguf_file": self.gguf_file} if self.gguf_file else {})

    def resolve(self) -> str:
        """The repository or folder to open.

        Raises:
            `OSError`: If the folder does not exist. The message says how to get it.
        """
        if self.source.startswith(CACHE_PREFIX):
            folder = cache_directory() / self.source.removeprefix(CACHE_PREFIX)
            if not (folder / "config.json").is_file():
                raise OSError(
                    f"The backbone `{self.part}` is `{self.source}`, and there is no checkpoint in {folder}. "
                    f"{self._how_to_build()}, set MINIGPT4_CACHE to the folder that holds it, or name another one "
                    f'with `from_pretrained(..., backbones={{"{self.part}": "REPOSITORY_OR_FOLDER"}})`.'
                )
            return str(folder)
        return self.source

    def _how_to_build(self) -> str:
        if self.source.startswith(CACHE_PREFIX + ORIGINAL_PREFIX):
            return (
                "Convert the original's files again with "
                "`python -m modeling_minigpt4.convert_minigpt4_original_to_hf --projection-only ...`"
            )
        return f"Build it with `{BUILD_TINY_BACKBONES}`"


def cache_directory() -> Path:
    """The folder that `cache:NAME` entries are resolved under.

    Returns:
        `Path`: `$MINIGPT4_CACHE`, or `$XDG_CACHE_HOME/minigpt4` (`~/.cache/minigpt4`) where that is not set.
    """
    if configured := os.environ.get("MINIGPT4_CACHE"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "minigpt4"


def load_config(backbone: Backbone, **hub_kwargs: Any) -> PreTrainedConfig:
    """The configuration at a source, whole: for a part of a larger model, the larger model's.

    Raises:
        `OSError`: If the source cannot be opened.
    """
    source = backbone.resolve()
    try:
        settings, _ = PreTrainedConfig.get_config_dict(source, **backbone.where(), **hub_kwargs)
        for known in (Blip2VisionConfig, Blip2QFormerConfig):
            if settings.get("model_type") == known.model_type:
                return known.from_dict(settings)
        return AutoConfig.from_pretrained(source, **backbone.where(), **hub_kwargs)
    except (OSError, ValueError) as error:
        raise OSError(
            f"The backbone `{backbone.part}` cannot be opened from `{backbone.source}`: {error} Download it, or name "
            f'another one with `backbones={{"{backbone.part}": "REPOSITORY_OR_FOLDER"}}`.'
        ) from error


def load_vision_tower(backbone: Backbone, image_size: int | None = None, **kwargs: Any) -> PreTrainedModel:
    """Opens the vision encoder: a model of its own, or that of a BLIP-2, a MiniGPT-4, a CLIP, ...

    Args:
        backbone ([`Backbone`]): Where it lies.
        image_size (`int`, *optional*): Side of the images in pixels, where it is not what the configuration says.
            BLIP-2's position embeddings are interpolated to it.
        kwargs: Passed to `from_pretrained`.
    """
    whole = load_config(backbone, **_hub_kwargs(kwargs))
    config = whole.vision_config if "vision_config" in whole.sub_configs else whole
    if image_size is not None:
        config.image_size = image_size
    model_class = Blip2VisionModel if isinstance(config, Blip2VisionConfig) else AutoModel
    model = _load_part(model_class.from_pretrained, backbone, whole, config, kwargs)
    if model.main_input_name != "pixel_values":
        raise ValueError(f"`{backbone.source}` is a {type(model).__name__}. Expected a vision encoder.")
    return model


def load_qformer(backbone: Backbone, **kwargs: Any) -> tuple[PreTrainedModel, torch.Tensor]:
    """Opens the Q-Former and its query tokens, of shape (1, num_query_tokens, hidden_size).

    Raises:
        `ValueError`: If the source holds no Q-Former with query tokens.
    """
    whole = load_config(backbone, **_hub_kwargs(kwargs))
    prefixes = _PREFIXES.get(whole.model_type)
    if prefixes is None or whole.qformer_config is None:
        raise ValueError(
            f"`{backbone.source}` holds a `{whole.model_type}`. Expected a BLIP-2 or a MiniGPT-4 with a Q-Former: a "
            "Q-Former alone lacks the query tokens that it was trained with."
        )
    qformer = _load_part(Blip2QFormerModel.from_pretrained, backbone, whole, whole.qformer_config, kwargs)
    tokens = _read_tensors(backbone, prefixes["query_tokens"], **_hub_kwargs(kwargs))[""]
    # An offloaded Q-Former is nowhere; its queries are small enough to stay.
    device = "cpu" if qformer.device.type == "meta" else qformer.device
    return qformer, tokens.to(device=device, dtype=qformer.dtype)


def load_language_model(backbone: Backbone, cast_to: torch.dtype | None = None, **kwargs: Any) -> PreTrainedModel:
    """Opens the language model with its head.

    Args:
        backbone ([`Backbone`]): Where it lies.
        cast_to (`torch.dtype`, *optional*): Dtype to read safetensors in, tensor by tensor. `from_pretrained` has both
            the files' tensors and the cast ones in memory.
        kwargs: Passed to `from_pretrained`.

    Raises:
        `ValueError`: If it is no decoder, or if it transforms its logits behind the head.
    """
    config = load_config(backbone, **_hub_kwargs(kwargs))
    text_config = config.get_text_config()
    if config.model_type in _PREFIXES or text_config.is_encoder_decoder:
        raise ValueError(
            f"`{backbone.source}` is a `{config.model_type}`. Expected a decoder of its own as the language model."
        )
    settings = text_config.to_dict()
    for name, neutral in {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}.items():
        if settings.get(name) not in (None, neutral):
            raise ValueError(
                f"`{backbone.source}` (`{config.model_type}`) sets `{name}` to {settings[name]}. Expected a decoder "
                "whose logits are what its head gives: MiniGPT-4 applies the head alone."
            )
    if cast_to is not None:
        kwargs["dtype"] = cast_to
        names = (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
        where = {"revision": backbone.revision, **_hub_kwargs(kwargs)}
        if any(_find_file(backbone.resolve(), name, **where) for name in names):
            kwargs["state_dict"] = _read_tensors(backbone, "", cast_to=cast_to, **_hub_kwargs(kwargs))
            model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # the Auto class needs a path
            return _load_part(model_class.from_pretrained, backbone, config, config, kwargs)
    return _load_part(AutoModelForCausalLM.from_pretrained, backbone, config, config, kwargs)


def load_generation_config(source: str, **checkpoint_kwargs: Any) -> GenerationConfig | None:
    """The generation settings of a checkpoint, or `None` where there are none."""
    path = _find_file(source, GENERATION_CONFIG_NAME, **checkpoint_kwargs)
    # From where it was found: `GenerationConfig` looks past the subfolder of a local folder.
    return None if path is None else GenerationConfig.from_pretrained(os.path.dirname(path))


def has_tokenizer(backbone: Backbone, **kwargs: Any) -> bool:
    """Whether a tokenizer lies beside the language model."""
    source = backbone.resolve()
    return _find_file(source, "tokenizer_config.json", revision=backbone.revision, **_hub_kwargs(kwargs)) is not None


def read_projection(source: str, **checkpoint_kwargs: Any) -> dict[str, torch.Tensor]:
    """`weight` and `bias` of the projection in a projection-only checkpoint, with or without a head."""
    names = ("model.multi_modal_projector.", "multi_modal_projector.")
    return _read_tensors(Backbone("multi_modal_projector", source), *names, **checkpoint_kwargs)


def _load_part(
    from_pretrained: Callable[..., Any],
    backbone: Backbone,
    whole: PreTrainedConfig,
    config: PreTrainedConfig,
    kwargs: dict[str, Any],
) -> PreTrainedModel:
    """Opens a part, and refuses one with missing weights, which transformers would fill at random."""
    prefixes = _PREFIXES.get(whole.model_type)
    if "state_dict" in kwargs:
        source = None
    elif prefixes is None:
        source, kwargs = backbone.resolve(), {**kwargs, **backbone.where()}
    else:
        hub_kwargs = _hub_kwargs(kwargs)
        tensors = _read_tensors(backbone, prefixes[backbone.part], **hub_kwargs)
        if isinstance(config, Blip2VisionConfig):
            tensors = fit_position_embedding(tensors, config)
        kwargs = {name: value for name, value in kwargs.items() if name not in hub_kwargs}
        source, kwargs = None, {**kwargs, "state_dict": tensors}
    try:
        model, info = from_pretrained(source, config=config, output_loading_info=True, **kwargs)
    except RuntimeError as error:
        raise ValueError(
            f"The weights of the `{backbone.part}` in `{backbone.source}` cannot be loaded: {error} Is the image size "
            "the one that it was trained with?"
        ) from error
    # No visual token passes through a pooler.
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
        raise ValueError(
            f"`{backbone.source}` lacks {len(missing)} weights of the `{backbone.part}` ({type(model).__name__}): "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Expected a complete checkpoint."
        )
    model.config.name_or_path = (
        backbone.source
    )  # saved with the configuration, where a path of this machine says nothing
    return model


def fit_position_embedding(tensors: dict[str, torch.Tensor], config: Blip2VisionConfig) -> dict[str, torch.Tensor]:
    """Interpolates the position embeddings of BLIP-2's vision encoder to another grid of patches, as the original does
    for the 448 pixels of MiniGPT-v2 (`interpolate_pos_embed` in its `eva_vit.py`): bicubic, in float32, the class
    token's left as it is.

    Args:
        tensors (`dict[str, torch.Tensor]`): Weights of the encoder.
        config ([`~transformers.Blip2VisionConfig`]): Its sizes, with the `image_size` that is wanted.

    Returns:
        `dict[str, torch.Tensor]`: The weights, with a position for every patch.
    """
    name = "embeddings.position_embedding"
    position = tensors.get(name)
    grid = config.image_size // config.patch_size
    if position is None or position.shape[1] == 1 + grid**2:
        return tensors
    trained = round((position.shape[1] - 1) ** 0.5)
    patches = position[:, 1:].float().unflatten(1, (trained, trained)).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).flatten(1, 2)
    return {**tensors, name: torch.cat([position[:, :1].float(), patches], dim=1)}


def _read_tensors(
    backbone: Backbone, *prefixes: str, cast_to: torch.dtype | None = None, **hub_kwargs: Any
) -> dict[str, torch.Tensor]:
    """The tensors behind some prefixes, without those. Only the shards that hold one are downloaded and opened."""
    source, where = backbone.resolve(), {"revision": backbone.revision, **hub_kwargs}
    index = _find_file(source, SAFE_WEIGHTS_INDEX_NAME, **where)
    if index is None:
        shards = [SAFE_WEIGHTS_NAME]
    else:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({shard for key, shard in weight_map.items() if key.startswith(prefixes)})
    tensors = {}
    for shard in shards:
        path = _find_file(source, shard, **where)
        if path is None:
            raise OSError(f"`{backbone.source}` has no file {shard}. Expected a checkpoint in safetensors format.")
        with safe_open(path, framework="pt") as weights:
            found = {key: prefix for key in weights.keys() for prefix in prefixes if key.startswith(prefix)}  # noqa: SIM118
        for key, prefix in found.items():
            # Opened for each tensor, because what was read of a file stays in memory as long as it is open.
            with safe_open(path, framework="pt") as weights:
                tensor = weights.get_tensor(key)
            if cast_to is not None and tensor.is_floating_point():
                tensor = tensor.to(cast_to)
            tensors[key.removeprefix(prefix)] = tensor
    if not tensors:
        raise ValueError(f"`{backbone.source}` holds no weights named `{prefixes[0]}...` for the `{backbone.part}`.")
    return tensors


def tensor_shapes(folder: str, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors behind a prefix in a folder's safetensors files, read off their headers.

    Args:
        folder (`str`): The folder.
        prefix (`str`): What the names start with; it is cut off.

    Returns:
        `dict[str, tuple[int, ...]]`: Empty where the folder has no safetensors files.
    """
    shapes = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                if key.startswith(prefix):
                    shapes[key.removeprefix(prefix)] = tuple(weights.get_slice(key).get_shape())
    return shapes


def _find_file(source: str, name: str, **hub_kwargs: Any) -> str | None:
    return cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        **hub_kwargs,
    )


def _hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments of `from_pretrained`, those that say how to reach the Hub."""
    names = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
    return {name: kwargs[name] for name in names if name in kwargs}


def embedding_spread(language_model: PreTrainedModel) -> float:
    """Standard deviation of the language model's input embeddings."""
    return language_model.get_input_embeddings().weight.detach().float().std().item()


def as_linear(head: nn.Module, backbone: Backbone) -> nn.Linear:
    """The head of a language model, if it is one that MiniGPT-4 can take over."""
    if not isinstance(head, nn.Linear):
        raise ValueError(f"The head of `{backbone.source}` is a {type(head).__name__}. Expected a linear layer.")
    return head
