"""PyTorch MiniGPT-4 model."""

import copy
import math
import os
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    Cache,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils import can_return_tuple, logging, torch_compilable_check

from .backbones_minigpt4 import (
    Backbone,
    as_linear,
    embedding_spread,
    has_tokenizer,
    load_generation_config,
    load_language_model,
    load_qformer,
    load_vision_tower,
    read_projection,
)
from .configuration_minigpt4 import MiniGPT4Config
from .generation_minigpt4 import StopSequenceCriteria
from .loading_minigpt4 import (
    CHECKPOINT_KWARGS,
    backbone_hub_kwargs,
    device_key,
    kwargs_of_part,
    merge_backbones,
    part_kwargs,
    quantize_language_model_only,
    requested_attention,
)


logger = logging.get_logger(__name__)


class MiniGPT4PreTrainedModel(PreTrainedModel):
    config: MiniGPT4Config
    config_class = MiniGPT4Config
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # At a learning rate of 1e-4 a bfloat16 weight stops moving.
    _keep_in_fp32_modules_strict = ["multi_modal_projector"]  # noqa: RUF012

    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MiniGPT4Model) and module.query_tokens is not None:
            init.normal_(module.query_tokens, mean=0.0, std=self.config.qformer_config.initializer_range)

    def freeze_backbones(self) -> None:
        """Freezes everything but the projection, which is kept in float32.

        The frozen parts have no gradients, stay in eval mode when a trainer calls `.train()`, and the vision side runs
        without an autograd graph.
        """
        self.requires_grad_(False)
        base: MiniGPT4Model = self.base_model
        base.multi_modal_projector.to(torch.float32).requires_grad_(True)
        self.train(self.training)

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        self.train(self.training)  # which layers recompute is decided there

    def backbone_source(self, part: str) -> str:
        """Repository or folder that a frozen part comes from, with `cache:NAME` resolved.

        Args:
            part (`str`): `"vision_tower"`, `"qformer"` or `"language_model"`.

        Raises:
            `ValueError`: If `config.backbones` does not say.
        """
        if part not in (self.config.backbones or {}):
            raise ValueError(f"`config.backbones` is {self.config.backbones} and does not name the {part}.")
        return Backbone.from_entry(part, self.config.backbones[part]).resolve()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args: Any,
        projection_only: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves the model as [`~PreTrainedModel.save_pretrained`] does.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to write to.
            projection_only (`bool`, *optional*, defaults to `False`):
                Whether to write the weights of the projection alone, and where the frozen parts come from:
                `config.backbones`, which `from_backbones` and a projection-only checkpoint fill in. This is how a
                MiniGPT-4 is published whose language model may not be passed on.
            state_dict (`dict[str, torch.Tensor]`, *optional*):
                Weights to save, where they are not the model's own.
            kwargs:
                Further arguments of [`~PreTrainedModel.save_pretrained`].

        Raises:
            `ValueError`: If `projection_only` is set and `config.backbones` does not name every frozen part.
        """
        backbones = self.config.backbones
        if projection_only:
            if unnamed := [part for part in self._frozen_parts() if part not in (backbones or {})]:
                raise ValueError(
                    f"`config.backbones` is {backbones} and does not say where {', '.join(unnamed)} come from, so a "
                    "projection-only checkpoint could not be opened again. Set "
                    f'`model.config.backbones = {{"{unnamed[0]}": {{"source": "REPOSITORY_OR_FOLDER"}}, ...}}`, or '
                    "save the whole model."
                )
            weights = self.state_dict() if state_dict is None else state_dict
            state_dict = {name: weight for name, weight in weights.items() if "multi_modal_projector." in name}
        else:
            self.config.backbones = None  # what it names would be read instead of the weights
        self.config.auto_map, self.config.custom_pipelines = _remote_code()
        try:
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        finally:
            self.config.backbones = backbones
            del self.config.custom_pipelines  # which would make `pipeline` ask for remote code

    def _frozen_parts(self) -> list[str]:
        parts = ["vision_tower", "qformer", "language_model"]
        return [part for part in parts if part != "qformer" or self.config.qformer_config is not None]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: Any = None,
        backbones: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Opens a checkpoint as [`~PreTrainedModel.from_pretrained`] does, a full or a projection-only one.

        For a projection-only checkpoint every frozen part is read once, from where `config.backbones` says, and only
        the shards that hold it. `dtype` and `device_map` apply to all parts, `quantization_config` to the language
        model, `attn_implementation` to the language model if it is a name and to each part if it is a dictionary with
        the keys `"vision_config"`, `"qformer_config"` and `"text_config"`. The projection stays in float32.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A repository or a folder.
            config ([`MiniGPT4Config`] or `str`, *optional*):
                Configuration to use instead of the checkpoint's.
            backbones (`dict`, *optional*):
                Where to take frozen parts of a projection-only checkpoint from instead, such as
                `{"language_model": "lmsys/vicuna-7b-v1.5"}`.
            kwargs:
                Further arguments of [`~PreTrainedModel.from_pretrained`].

        Raises:
            `OSError`: If a frozen part cannot be found. The message says how to get it.
            `ValueError`: If a frozen part lacks weights, or does not fit the projection.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        if not isinstance(config, PreTrainedConfig):
            kept = (*CHECKPOINT_KWARGS, "dtype", "torch_dtype")  # the configuration would swallow them
            hub_kwargs = {name: kwargs[name] for name in kept if name in kwargs}
            kwargs = {name: value for name, value in kwargs.items() if name not in ("dtype", "torch_dtype")}
            config, kwargs = cls.config_class.from_pretrained(
                pretrained_model_name_or_path if config is None else config, return_unused_kwargs=True, **kwargs
            )
            kwargs = hub_kwargs | kwargs
        if config.backbones is not None:
            config = copy.deepcopy(config)
            config.backbones = merge_backbones(config.backbones, backbones or {})
            return cls._from_projection(str(pretrained_model_name_or_path), config, **kwargs)
        if backbones:
            raise ValueError(
                f"`backbones={backbones}` was given, but {pretrained_model_name_or_path} is a full checkpoint, which "
                "holds every weight. Leave `backbones` out, or open a projection-only checkpoint."
            )
        if (quantization_config := kwargs.get("quantization_config")) is not None:
            kwargs["quantization_config"] = quantize_language_model_only(quantization_config)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    @classmethod
    def _from_projection(cls, source: str, config: MiniGPT4Config, **kwargs: Any) -> Any:
        hub_kwargs = {name: kwargs.pop(name) for name in CHECKPOINT_KWARGS if name in kwargs}
        output_loading_info = kwargs.pop("output_loading_info", False)
        generation_config = kwargs.pop("generation_config", None)
        kwargs["attn_implementation"] = kwargs.get("attn_implementation") or requested_attention(config)
        dtype = kwargs.pop("torch_dtype", None) or kwargs.get("dtype")  # the former is its name of old
        kwargs["dtype"] = (config.dtype or "auto") if dtype in (None, "auto") else dtype
        model = cls._assemble(config, **part_kwargs(kwargs), **backbone_hub_kwargs(hub_kwargs))
        model._load_projection(source, read_projection(source, **hub_kwargs))
        model.config._name_or_path = model.name_or_path = source
        if model.can_generate():
            model.generation_config = (
                generation_config
                or load_generation_config(source, **hub_kwargs)
                or GenerationConfig.from_model_config(model.config)
            )
        info: dict[str, Any] = {
            "missing_keys": set(),
            "unexpected_keys": set(),
            "mismatched_keys": set(),
            "error_msgs": [],
        }
        return (model, info) if output_loading_info else model

    @classmethod
    def _assemble(cls, config: MiniGPT4Config, **kwargs: Any) -> Any:
        """A model around opened backbones. Its own weights, those of the projection, are still to be filled in."""
        backbones = {part: Backbone.from_entry(part, entry) for part, entry in config.backbones.items()}
        for backbone in backbones.values():
            backbone.resolve()  # what is missing is said before anything large is read
        if config.qformer_config is None:
            backbones.pop("qformer", None)
        # BLIP-2's position embeddings are interpolated; other encoders are as large as they are.
        image_size = config.vision_config.image_size if isinstance(config.vision_config, Blip2VisionConfig) else None
        return cls.from_parts(config, *_open_parts(backbones, image_size, kwargs), backbones["language_model"])

    @classmethod
    def from_parts(
        cls,
        config: MiniGPT4Config,
        vision_tower: PreTrainedModel,
        qformer: tuple[PreTrainedModel, torch.Tensor] | None,
        language_model: PreTrainedModel,
        origin: Backbone,
    ) -> Any:
        """Puts opened parts together. The projection is still to be filled in.

        Args:
            config ([`MiniGPT4Config`]): The configuration, which takes over those of the parts.
            vision_tower ([`~transformers.PreTrainedModel`]): The vision encoder.
            qformer (`tuple`, *optional*): The Q-Former and its query tokens.
            language_model ([`~transformers.PreTrainedModel`]): A decoder with its head.
            origin ([`Backbone`]): Where the language model comes from, for errors.

        Returns:
            The model, in eval mode.
        """
        # The configuration describes the parts that are there, which `backbones=` may have changed.
        sub_configs = {"vision_config": vision_tower.config, "text_config": language_model.config.get_text_config()}
        if qformer is not None:
            sub_configs["qformer_config"] = qformer[0].config
        config.update(copy.deepcopy(sub_configs))  # the skeleton would reset the parts' attention implementations
        config.tie_word_embeddings = config.text_config.tie_word_embeddings
        with init.no_init_weights(), torch.device("meta"), init.meta_device_safe_creation_ops():
            model = cls(config)
        config.update(sub_configs)
        base: MiniGPT4Model = model.base_model
        base.vision_tower = vision_tower
        if isinstance(vision_tower, Blip2VisionModel):
            _set_post_layernorm(vision_tower, config)
        base.language_model = language_model.base_model
        if qformer is not None:
            base.qformer, tokens = qformer
            base.query_tokens = nn.Parameter(tokens)
        embeddings = base.language_model.get_input_embeddings().weight
        base.multi_modal_projector.to_empty(device="cpu" if embeddings.is_meta else embeddings.device)
        if isinstance(model, MiniGPT4ForConditionalGeneration):
            model.lm_head = as_linear(language_model.get_output_embeddings(), origin)
        model._take_device_map(vision_tower, language_model)
        return model.eval()

    def _take_device_map(self, vision_tower: PreTrainedModel, language_model: PreTrainedModel) -> None:
        """Tells Trainer and pipelines where a `device_map` has placed the parts."""
        if "hf_device_map" not in vars(language_model):
            return
        prefix = "model." if isinstance(self, MiniGPT4ForConditionalGeneration) else ""
        inner = f"{language_model.base_model_prefix}."
        placed = {f"{prefix}vision_tower": vision_tower.device}
        for name, device in language_model.hf_device_map.items():
            head = name and not name.startswith(inner)
            placed[name if head else f"{prefix}language_model.{name.removeprefix(inner)}".rstrip(".")] = device
        self.hf_device_map = {name: device_key(device) for name, device in placed.items()}

    @torch.no_grad()
    def _load_projection(self, source: str, weights: dict[str, torch.Tensor]) -> None:
        projector = self.base_model.multi_modal_projector
        expected = {name: tuple(parameter.shape) for name, parameter in projector.named_parameters()}
        received = {name: tuple(weight.shape) for name, weight in weights.items()}
        if received != expected:
            raise ValueError(
                f"The projection in {source} has the shapes {received}, but the backbones "
                f"{self.config.backbones} need {expected}. Use the backbones that it was trained with."
            )
        projector.load_state_dict(weights)


class MiniGPT4Model(MiniGPT4PreTrainedModel):
    """MiniGPT-4 without a language modeling head: a frozen vision encoder and Q-Former, one linear projection, and a
    frozen language model.

    Args:
        config ([`MiniGPT4Config`]): Its configuration.
    """

    def __init__(self, config: MiniGPT4Config):
        super().__init__(config)
        if isinstance(config.vision_config, Blip2VisionConfig):
            self.vision_tower = Blip2VisionModel._from_config(config.vision_config)
            _set_post_layernorm(self.vision_tower, config)
        else:
            self.vision_tower = AutoModel.from_config(config.vision_config)
        if config.qformer_config is None:
            self.qformer, self.query_tokens = None, None
        else:
            _check_qformer_width(config)
            shape = (1, config.num_query_tokens, config.qformer_config.hidden_size)
            self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
            self.query_tokens = nn.Parameter(torch.zeros(shape))
        self.language_model = AutoModel.from_config(config.text_config)
        if config.projection_in_features is None:
            raise ValueError(
                f"`vision_feature_size` is None and the `{config.vision_config.model_type}` configuration has no "
                "`hidden_size`. Set `vision_feature_size` to the channels of the vision encoder's last feature map."
            )
        embedding_size = self.language_model.get_input_embeddings().embedding_dim
        self.multi_modal_projector = nn.Linear(config.projection_in_features, embedding_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> "MiniGPT4Model":
        """Sets training mode, but for the parts that are frozen: those keep dropout off and their statistics fixed."""
        super().train(mode)
        for part in (self.vision_tower, self.qformer, self.language_model):
            if part is not None and not _is_trainable(part):
                part.eval()
        # A layer recomputes its activations in training mode only. The modules in it, dropout too, stay as they are.
        for module in self.language_model.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module.training = mode
        return self

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, ...] | BaseModelOutputWithPooling:
        """Encodes images into visual tokens.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`):
                Images as the processor prepares them.
            kwargs:
                Passed to the vision encoder, such as `interpolate_pos_encoding`.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `last_hidden_state` holds the frozen
            features, of shape `(num_images, num_visual_tokens, projection_in_features)`, which `forward` takes as
            `image_features`; `pooler_output` the projected ones, of shape `(num_images, num_visual_tokens,
            hidden_size)`, in the projection's dtype.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._vision_needs_gradients(pixel_values)):
            # With channels last, a bfloat16 convolution is six times as fast on a CPU.
            pixel_values = pixel_values.to(self.vision_tower.dtype, memory_format=torch.channels_last)
            outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
            features = self._query(self._patch_tokens(outputs.last_hidden_state, pixel_values))
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=self.project(features),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def project(self, image_features: torch.Tensor) -> torch.Tensor:
        """Projects frozen features to the width of the language model.

        Args:
            image_features (`torch.FloatTensor` of shape `(num_images, num_visual_tokens, projection_in_features)`):
                `last_hidden_state` of `get_image_features`.

        Returns:
            `torch.FloatTensor` of shape `(num_images, num_visual_tokens, hidden_size)`, in the projection's dtype.
        """
        projector = self.multi_modal_projector
        return projector(image_features.to(device=projector.weight.device, dtype=projector.weight.dtype))

    def _vision_needs_gradients(self, pixel_values: torch.Tensor) -> bool:
        if pixel_values.requires_grad or _is_trainable(self.vision_tower):
            return True
        if self.qformer is None or self.query_tokens is None:
            return False
        return _is_trainable(self.qformer) or self.query_tokens.requires_grad

    def _patch_tokens(self, hidden_state: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """The encoder's output as a sequence of tokens, (num_images, num_tokens, vision_feature_size)."""
        if hidden_state.ndim == 4:  # a feature map, row by row
            hidden_state = hidden_state.flatten(2).transpose(1, 2)
        if self.config.vision_feature_layer_norm:
            hidden_state = nn.functional.layer_norm(hidden_state, hidden_state.shape[-1:])
        if self.qformer is not None:
            return hidden_state
        hidden_state = hidden_state[:, self._num_prefix_tokens(hidden_state.shape[1], pixel_values) :]
        merge_size = self.config.token_merge_size
        if hidden_state.shape[1] % merge_size:
            raise ValueError(
                f"The vision encoder gives {hidden_state.shape[1]} patch tokens for images of "
                f"{pixel_values.shape[-2]}x{pixel_values.shape[-1]} pixels, which cannot be merged by "
                f"`token_merge_size` {merge_size}. Choose a `token_merge_size` or an image size that divides evenly."
            )
        return hidden_state.unflatten(1, (-1, merge_size)).flatten(2)

    def _num_prefix_tokens(self, num_tokens: int, pixel_values: torch.Tensor) -> int:
        """Class and register tokens: those beyond the grid of patches. Hierarchical encoders have fewer tokens."""
        patch_size = self.config.vision_config.to_dict().get("patch_size")
        if not isinstance(patch_size, int):
            return 0
        height, width = pixel_values.shape[-2:]
        return max(0, num_tokens - (height // patch_size) * (width // patch_size))

    def _query(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        if self.qformer is None or self.query_tokens is None:
            return patch_tokens
        queries = self.query_tokens.expand(len(patch_tokens), -1, -1)
        return self.qformer(
            query_embeds=queries.to(patch_tokens.device), encoder_hidden_states=patch_tokens, return_dict=True
        ).last_hidden_state

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...] | LlavaModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids, with `config.image_seq_length` placeholders for each image, in the order of the images.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`, *optional*):
                The images of all rows, one after the other.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions of the tokens.
            past_key_values ([`~transformers.Cache`], *optional*):
                Keys and values of earlier tokens.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings instead of `input_ids`, with the visual tokens already in place.
            image_features (`torch.FloatTensor`, *optional*):
                Frozen features made earlier, instead of `pixel_values`: `last_hidden_state` of `get_image_features`,
                of shape `(num_images, num_visual_tokens, projection_in_features)`.
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*):
                `{"image": ...}` with the output of `get_image_features`, instead of `pixel_values`.
            kwargs:
                Passed to the language model.

        Raises:
            `ValueError`: If images and placeholders do not match, or images are given in more than one way.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected either `input_ids` or `inputs_embeds`, got both or neither.")
        visual_tokens = self._visual_tokens(pixel_values, image_features, mm_encoder_outputs)
        if input_ids is None:
            if visual_tokens is not None:
                raise ValueError(
                    "Images need `input_ids`, whose placeholders say where they stand: got `inputs_embeds`."
                )
        else:
            inputs_embeds = self._embed(input_ids, visual_tokens)
        if position_ids is None and inputs_embeds is not None:
            position_ids = _positions(attention_mask, inputs_embeds.shape[1])
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=visual_tokens,
        )

    def _visual_tokens(
        self,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
    ) -> torch.Tensor | None:
        """The projected visual tokens of all images, (num_images, num_visual_tokens, hidden_size)."""
        encoded = (mm_encoder_outputs or {}).get("image")
        given = {"pixel_values": pixel_values, "image_features": image_features, "mm_encoder_outputs": encoded}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ValueError(f"Images were given as {' and as '.join(names)}. Expected one of them.")
        if pixel_values is not None:
            return self.get_image_features(pixel_values, return_dict=True).pooler_output
        if image_features is not None:
            return self.project(image_features)
        if encoded is None:
            return None
        tokens = encoded.pooler_output
        return tokens if isinstance(tokens, torch.Tensor) else torch.stack(tuple(tokens))

    def _embed(self, input_ids: torch.Tensor, visual_tokens: torch.Tensor | None) -> torch.Tensor:
        """Embeds text and puts the visual tokens into the places of the placeholders, whose id is never looked up."""
        mask = input_ids == self.config.image_token_id
        inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(mask, 0))
        if visual_tokens is None:
            torch_compilable_check(
                ~mask.any(),
                lambda: (
                    f"The prompt has {int(mask.sum())} image placeholders (id {self.config.image_token_id}), but no "
                    "images were given. Pass `pixel_values`, `image_features` or `mm_encoder_outputs`."
                ),
            )
            return inputs_embeds
        num_tokens = visual_tokens.shape[0] * visual_tokens.shape[1]
        torch_compilable_check(
            mask.sum() == num_tokens,
            lambda: (
                f"The prompt has {int(mask.sum())} image placeholders (id {self.config.image_token_id}), but "
                f"{visual_tokens.shape[0]} images of {visual_tokens.shape[1]} visual tokens were given. Expected "
                f"{num_tokens} placeholders."
            ),
        )
        visual_tokens = visual_tokens.to(device=inputs_embeds.device, dtype=inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), visual_tokens)


def _open_parts(
    backbones: dict[str, Backbone], image_size: int | None, kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, tuple[PreTrainedModel, torch.Tensor] | None, PreTrainedModel]:
    """The vision encoder, the Q-Former with its query tokens, and the language model."""
    vision_tower = load_vision_tower(backbones["vision_tower"], image_size, **kwargs_of_part("vision_config", kwargs))
    qformer = None
    if "qformer" in backbones:
        qformer = load_qformer(backbones["qformer"], **kwargs_of_part("qformer_config", kwargs))
    language_model = load_language_model(backbones["language_model"], **kwargs_of_part("text_config", kwargs))
    return vision_tower, qformer, language_model


def _positions(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Positions of the last tokens, without padding, which decoders with learned positions would count."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]


def _is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _remote_code() -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """What `trust_remote_code=True` finds in a saved folder: the classes for auto classes, and those for pipelines."""
    # Imported here because it imports the configuration only; the statement makes its file travel with the model.
    from .pipeline_minigpt4 import MiniGPT4Pipeline

    def reference(cls: type) -> str:
        return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"

    generating = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    auto_map = {"AutoConfig": reference(MiniGPT4Config)}
    auto_map |= dict.fromkeys(generating, reference(MiniGPT4ForConditionalGeneration))
    tasks = ("image-to-text", "image-text-to-text")
    return auto_map, {
        task: {"impl": reference(MiniGPT4Pipeline), "pt": ["AutoModelForImageTextToText"]} for task in tasks
    }


def _set_post_layernorm(vision_tower: Blip2VisionModel, config: MiniGPT4Config) -> None:
    """Makes the layer norm behind the vision encoder the original's `ln_vision`."""
    if config.vision_post_layernorm_affine:
        vision_tower.post_layernorm.eps = config.vision_post_layernorm_eps
    else:
        vision_tower.post_layernorm = nn.LayerNorm(
            config.vision_config.hidden_size, eps=config.vision_post_layernorm_eps, elementwise_affine=False
        )


def _check_qformer_width(config: MiniGPT4Config) -> None:
    expected = config.qformer_config.encoder_hidden_size
    if config.vision_feature_size != expected:
        raise ValueError(
            f"The vision encoder gives features of size {config.vision_feature_size}, but the Q-Former reads features "
            f"of size {expected} (`qformer_config.encoder_hidden_size`). Take both from the same BLIP-2."
        )


class MiniGPT4ForConditionalGeneration(MiniGPT4PreTrainedModel, GenerationMixin):
    """MiniGPT-4 (https://huggingface.co/papers/2304.10592): a language model that sees through one trained linear
    projection.

    Args:
        config ([`MiniGPT4Config`]): Its configuration.

    Example:

    ```python
    >>> import modeling_minigpt4  # registers the Auto classes
    >>> from PIL import Image
    >>> from transformers import AutoModel, AutoProcessor

    >>> model = AutoModel.from_pretrained("examples/tiny/checkpoint/stage1")
    >>> processor = AutoProcessor.from_pretrained("examples/tiny/checkpoint/stage1")
    >>> image = Image.open("examples/tiny/photographs/chelsea.jpg")
    >>> inputs = processor(images=image, text=processor.image_prompt(), add_special_tokens=False, return_tensors="pt")
    >>> generated = model.generate(**inputs, max_new_tokens=32)
    >>> processor.post_process_image_text_to_text(generated[:, inputs["input_ids"].shape[1] :])[0]
    ```"""

    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: MiniGPT4Config):
        super().__init__(config)
        self.model = MiniGPT4Model(config)
        embeddings = self.model.get_input_embeddings()
        self.lm_head: nn.Module = nn.Linear(
            self.model.multi_modal_projector.out_features, config.text_config.vocab_size, bias=config.lm_head_bias
        )
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    @classmethod
    def from_backbones(
        cls,
        vision_tower: str | os.PathLike | dict[str, str],
        language_model: str | os.PathLike | dict[str, str],
        qformer: str | os.PathLike | dict[str, str] | None = None,
        *,
        image_size: int | None = None,
        image_token_index: int | None = None,
        vision_feature_layer_norm: bool | None = None,
        config_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "MiniGPT4ForConditionalGeneration":
        """Assembles a model from pretrained parts, with a fresh projection.

        The projection starts at a scale that gives the visual tokens of an image of noise the spread of the language
        model's own embeddings, and in float32.

        Args:
            vision_tower (`str`, `os.PathLike` or `dict`):
                Repository, folder or `cache:NAME` of a vision encoder, or of a model with one: a BLIP-2, a CLIP, ... A
                dictionary names a revision too: `{"source": ..., "revision": ...}`.
            language_model (`str`, `os.PathLike` or `dict`):
                The same of a decoder with its head.
            qformer (`str`, `os.PathLike` or `dict`, *optional*):
                The same of a BLIP-2 or a MiniGPT-4 with a Q-Former. Without one, neighbouring patch tokens are merged.
            image_size (`int`, *optional*):
                Side of the images in pixels, where it is not what the vision encoder's configuration says.
            image_token_index (`int`, *optional*):
                Id of the image placeholder. Defaults to the length of the language model's tokenizer, and where there
                is none, to the size of its vocabulary.
            vision_feature_layer_norm (`bool`, *optional*):
                Whether to normalise the patch tokens. Defaults to whether the vision encoder gives a feature map, as
                convolutional ones do, which do not end in a layer norm.
            config_kwargs (`dict`, *optional*):
                Further fields of the [`MiniGPT4Config`], such as `token_merge_size`.
            kwargs:
                `dtype`, `device_map`, `attn_implementation`, `quantization_config`, and what says how to reach the
                Hub, as for `from_pretrained`.

        Returns:
            [`MiniGPT4ForConditionalGeneration`]: The model, in eval mode, with nothing frozen yet.

        Raises:
            `OSError`: If a part cannot be found.
            `ValueError`: If a part lacks weights, or if two parts do not fit.
        """
        sources = {"vision_tower": vision_tower, "qformer": qformer, "language_model": language_model}
        backbones = {part: Backbone.from_entry(part, source) for part, source in sources.items() if source is not None}
        for backbone in backbones.values():
            backbone.resolve()
        if located := kwargs.keys() & {"revision", "subfolder"}:
            raise ValueError(
                f"Got {sorted(located)} for all parts at once. Expected it with the part that it belongs to: "
                '{"source": "REPOSITORY", "revision": "..."}.'
            )
        hub_kwargs = {name: kwargs.pop(name) for name in CHECKPOINT_KWARGS if name in kwargs}
        kwargs = part_kwargs(kwargs) | hub_kwargs
        vision, queries, decoder = _open_parts(backbones, image_size, kwargs)
        head = as_linear(decoder.get_output_embeddings(), backbones["language_model"])
        if image_token_index is None and has_tokenizer(backbones["language_model"], **hub_kwargs):
            backbone = backbones["language_model"]
            tokenizer = AutoTokenizer.from_pretrained(backbone.resolve(), revision=backbone.revision, **hub_kwargs)
            image_token_index = len(tokenizer)
        feature_shape = _feature_shape(vision)
        is_map = len(feature_shape) == 4
        settings = {
            # copies, since a configuration resets the attention implementations of its parts
            "vision_config": copy.deepcopy(vision.config),
            "qformer_config": copy.deepcopy(queries[0].config) if queries else None,
            "text_config": copy.deepcopy(decoder.config.get_text_config()),
            "num_query_tokens": queries[1].shape[1] if queries else 0,
            "vision_feature_size": feature_shape[1] if is_map else feature_shape[2],
            "vision_feature_layer_norm": is_map if vision_feature_layer_norm is None else vision_feature_layer_norm,
            "image_token_index": image_token_index,
            "lm_head_bias": head.bias is not None,
            "backbones": {part: backbone.to_entry() for part, backbone in backbones.items()},
            "dtype": decoder.dtype,
        }
        config = MiniGPT4Config(**settings | (config_kwargs or {}))
        model = cls.from_parts(config, vision, queries, decoder, backbones["language_model"])
        model.init_projection()
        model.generation_config = decoder.generation_config
        return model

    @torch.no_grad()
    def init_projection(self) -> None:
        """Draws a fresh projection, at a scale that gives the visual tokens of an image of noise the spread of the
        language model's embeddings, and counts those tokens.

        Raises:
            `ValueError`: If the vision side gives nothing but zeros, or no numbers.
        """
        projector = self.model.multi_modal_projector
        nn.init.zeros_(projector.bias)
        nn.init.normal_(projector.weight, std=1.0)
        features = self.model.get_image_features(_noise_image(self.model.vision_tower)).last_hidden_state.float()
        size = features.square().mean().sqrt().item()
        if not 0 < size < math.inf:
            raise ValueError(
                f"The features of an image of noise have the root mean square {size}. Expected a positive number: the "
                "vision encoder or the Q-Former is damaged, or was never trained."
            )
        projector.weight *= embedding_spread(self.model.language_model) / (size * math.sqrt(projector.in_features))
        self.config.image_seq_length = features.shape[1]

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, ...] | BaseModelOutputWithPooling:
        """See [`MiniGPT4Model.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...] | LlavaCausalLMOutputWithPast:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids to predict, shifted inside; -100 is ignored.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                For how many of the last positions, or for which ones, to compute logits. 0 means all.
            kwargs:
                The other arguments are those of [`MiniGPT4Model.forward`].
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_features=image_features,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        # `generate` repeats whole groups of images for beams in `mm_encoder_outputs` only, and changes them in place.
        encoded = {name: copy.copy(output) for name, output in (model_kwargs.get("mm_encoder_outputs") or {}).items()}
        if (image_features := model_kwargs.pop("image_features", None)) is not None:
            if "image" in encoded:
                raise ValueError(
                    "Images were given as image_features and as mm_encoder_outputs. Expected one of them."
                )
            encoded["image"] = BaseModelOutputWithPooling(
                last_hidden_state=image_features, pooler_output=self.model.project(image_features)
            )
        model_kwargs["mm_encoder_outputs"] = encoded
        return super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        input_ids_seq_length: int | None = None,
        encoder_input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        # The original generates from embeddings, so that its repetition penalty never saw the prompt.
        processors = super()._get_logits_processor(
            generation_config, input_ids_seq_length, encoder_input_ids=encoder_input_ids, **kwargs
        )
        given = kwargs.get("logits_processor") or []
        for processor in processors:
            if any(processor is one for one in given):
                continue
            if isinstance(processor, RepetitionPenaltyLogitsProcessor):
                processor.prompt_ignore_length = input_ids_seq_length or 0
            elif isinstance(processor, EncoderRepetitionPenaltyLogitsProcessor):
                ids = processor.encoder_input_ids
                processor.encoder_input_ids = torch.where(ids == self.config.image_token_id, ids[:, :1], ids)
        if self.config.image_token_id < self.config.text_config.vocab_size:  # a spare row of a padded vocabulary
            processors.append(SuppressTokensLogitsProcessor([self.config.image_token_id], self.device))
        return processors

    def _get_candidate_generator(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        if generation_config.prompt_lookup_num_tokens is not None:
            raise ValueError(
                f"Got prompt_lookup_num_tokens={generation_config.prompt_lookup_num_tokens}. Expected None: prompt "
                "lookup would propose image placeholders as text."
            )
        return super()._get_candidate_generator(generation_config, *args, **kwargs)

    def _get_stopping_criteria(
        self, generation_config: GenerationConfig, stopping_criteria: StoppingCriteriaList | None, **kwargs: Any
    ) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, **kwargs)
        if self.config.stop_sequences:
            criteria.append(StopSequenceCriteria(self.config.stop_sequences))
        return criteria


def _noise_image(vision_tower: PreTrainedModel) -> torch.Tensor:
    size = vision_tower.config.to_dict().get("image_size")
    if size is None:
        raise ValueError(
            f"The configuration of the {type(vision_tower).__name__} has no `image_size`. Pass the side of the images "
            "in pixels, as `from_backbones(..., image_size=224)`."
        )
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    return image.to(vision_tower.device)


@torch.no_grad()
def _feature_shape(vision_tower: PreTrainedModel) -> torch.Size:
    return vision_tower(_noise_image(vision_tower).to(vision_tower.dtype), return_dict=True).last_hidden_state.shape


__all__ = ["MiniGPT4ForConditionalGeneration", "MiniGPT4Model", "MiniGPT4PreTrainedModel"]
