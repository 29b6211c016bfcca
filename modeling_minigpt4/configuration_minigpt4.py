"""MiniGPT-4 model configuration."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, Blip2QFormerConfig, Blip2VisionConfig, PreTrainedConfig
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME


# `AutoConfig` knows every configuration but the two that BLIP-2 keeps to itself.
_BLIP_2_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    Blip2VisionConfig.model_type: Blip2VisionConfig,
    Blip2QFormerConfig.model_type: Blip2QFormerConfig,
}


def _as_config(
    config: dict[str, Any] | PreTrainedConfig | None, default_model_type: str, **defaults: Any
) -> PreTrainedConfig:
    """A sub-configuration object from an object, a dictionary, or nothing."""
    if isinstance(config, PreTrainedConfig):
        return config
    settings = dict(defaults) if config is None else dict(config)
    model_type = settings.pop("model_type", default_model_type)
    if model_type in _BLIP_2_CONFIGS:
        return _BLIP_2_CONFIGS[model_type](**settings)
    return AutoConfig.for_model(model_type, **settings)


@strict
class MiniGPT4Config(PreTrainedConfig):
    r"""
    Configuration of a [`MiniGPT4Model`] or a [`MiniGPT4ForConditionalGeneration`]. The defaults are those of MiniGPT-4
    with Vicuna-7B (https://huggingface.co/papers/2304.10592): a 39-layer ViT-g at 224 pixels, a 12-layer Q-Former with
    32 queries, a 7B LLaMA.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `Blip2VisionConfig`):
            Configuration of the vision encoder: BLIP-2's, or that of any vision encoder that `AutoModel` builds.
        qformer_config (`Blip2QFormerConfig` or `dict`, *optional*, defaults to `Blip2QFormerConfig`):
            Configuration of the Q-Former. `None` means that there is none: the class token is dropped and
            `token_merge_size` neighbouring patch tokens are concatenated instead, as in the LLaMA-2 variant and in
            MiniGPT-v2.
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `LlamaConfig`):
            Configuration of the language model, any decoder that `AutoModel` builds.
        num_query_tokens (`int`, *optional*, defaults to 32):
            Visual tokens that the Q-Former gives for an image.
        token_merge_size (`int`, *optional*, defaults to 4):
            Patch tokens, neighbours in sequence order, that become one visual token where there is no Q-Former.
        vision_feature_size (`int`, *optional*):
            Channels of a patch token. Defaults to `vision_config.hidden_size`; to be given for an encoder whose
            configuration has no such field, as convolutional ones.
        vision_feature_layer_norm (`bool`, *optional*, defaults to `False`):
            Whether to apply a layer norm without parameters to the patch tokens, for an encoder that does not end in
            one.
        vision_post_layernorm_eps (`float`, *optional*, defaults to 1e-05):
            Epsilon of the layer norm behind BLIP-2's vision encoder (`ln_vision` in the original). transformers'
            BLIP-2 takes that of the layer norms inside the encoder, 1e-6.
        vision_post_layernorm_affine (`bool`, *optional*, defaults to `True`):
            Whether that layer norm has a scale and a shift. The original's LLaMA-2 variant and MiniGPT-v2 neither load
            nor train them.
        image_seq_length (`int`, *optional*):
            Visual tokens of an image. Defaults to `num_query_tokens` with a Q-Former, and to the number of merged
            patches where the vision configuration has `image_size` and `patch_size`.
        image_token_index (`int`, *optional*):
            Id of the placeholder token `<ImageHere>`. Defaults to the size of the vocabulary. It is never looked up
            in the embedding table, so it may lie inside or outside of it.
        stop_sequences (`list[list[int]]`, *optional*):
            Sequences of token ids after which generation stops, for an end symbol that the tokenizer writes in more
            than one token, such as `###`. A symbol of one token belongs into `generation_config.eos_token_id`.
        lm_head_bias (`bool`, *optional*, defaults to `False`):
            Whether the language model's head has a bias.
        backbones (`dict[str, dict[str, str]]`, *optional*):
            Where the frozen parts come from; only in a projection-only checkpoint. Keys are `"vision_tower"`,
            `"qformer"` and `"language_model"`, values are `{"source": ..., "revision": ..., "gguf_file": ...}`: the
            source is a repository, a folder, or `cache:NAME`.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of a fresh projection's weights. [`MiniGPT4ForConditionalGeneration.from_backbones`]
            measures a better one.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the head shares the language model's embeddings. Follows `text_config`.

    Example:

    ```python
    >>> from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration

    >>> configuration = MiniGPT4Config()
    >>> model = MiniGPT4ForConditionalGeneration(configuration)  # random weights, at full size
    ```"""

    model_type = "minigpt4"
    attribute_map = {"image_token_id": "image_token_index"}  # noqa: RUF012
    sub_configs = {"vision_config": AutoConfig, "qformer_config": Blip2QFormerConfig, "text_config": AutoConfig}  # noqa: RUF012

    vision_config: Any = None
    qformer_config: Any = "default"  # `None` is a choice of its own
    text_config: Any = None
    num_query_tokens: int = 32
    token_merge_size: int = 4
    vision_feature_size: int | None = None
    vision_feature_layer_norm: bool = False
    vision_post_layernorm_eps: float = 1e-5
    vision_post_layernorm_affine: bool = True
    image_seq_length: int | None = None
    image_token_index: int | None = None
    stop_sequences: list[list[int]] | None = None
    lm_head_bias: bool = False
    backbones: Any = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _as_config(self.vision_config, Blip2VisionConfig.model_type)
        self.text_config = _as_config(self.text_config, "llama")
        if self.vision_feature_size is None and "hidden_size" in self.vision_config.to_dict():
            self.vision_feature_size = self.vision_config.hidden_size
        if self.qformer_config == "default":
            self.qformer_config = Blip2QFormerConfig(encoder_hidden_size=self.vision_feature_size or 1408)
        elif self.qformer_config is not None:
            self.qformer_config = _as_config(self.qformer_config, Blip2QFormerConfig.model_type)
        if self.image_token_index is None:
            self.image_token_index = self.text_config.vocab_size
        if self.image_seq_length is None:
            self.image_seq_length = self._count_visual_tokens()
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if not cls.__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
            # The registered pipeline needs no remote code, which `pipeline` would ask for.
            config_dict = {name: value for name, value in config_dict.items() if name != "custom_pipelines"}
        # `AutoModel.from_pretrained(..., backbones=...)` hands its arguments to the configuration first, which would
        # take the replacement of one backbone for the whole list.
        if "backbones" not in kwargs:
            return super().from_dict(config_dict, **kwargs)
        backbones = kwargs.pop("backbones")
        if kwargs.get("return_unused_kwargs", False):
            config, unused = super().from_dict(config_dict, **kwargs)
            return config, {**unused, "backbones": backbones}
        return super().from_dict({**config_dict, "backbones": backbones}, **kwargs)

    def _count_visual_tokens(self) -> int | None:
        if self.qformer_config is not None:
            return self.num_query_tokens
        vision = self.vision_config.to_dict()
        if not isinstance(vision.get("image_size"), int) or not isinstance(vision.get("patch_size"), int):
            return None
        return (vision["image_size"] // vision["patch_size"]) ** 2 // self.token_merge_size

    @property
    def projection_in_features(self) -> int | None:
        """Width of what the projection reads: the Q-Former's, or that of the merged patch tokens."""
        if self.qformer_config is not None:
            return self.qformer_config.hidden_size
        if self.vision_feature_size is None:
            return None
        return self.vision_feature_size * self.token_merge_size


__all__ = ["MiniGPT4Config"]
