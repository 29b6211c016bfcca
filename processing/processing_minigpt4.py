"""Processor class for MiniGPT-4."""

import copy
import inspect
from typing import Any

from transformers import LlamaTokenizer
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils import is_numpy_array, is_torch_tensor

from .image_loading_minigpt4 import load_rgb_image


# transformers 5.19 cannot keep a special token as plain text yet.
_CAN_SANITIZE = "sanitize_control_tokens" in inspect.signature(ProcessorMixin.apply_chat_template).parameters


class MiniGPT4Processor(ProcessorMixin):
    r"""
    Turns text and images into the inputs of a MiniGPT-4: a BLIP image processor, the language model's tokenizer, and a
    placeholder that is repeated once for each visual token.

    Args:
        image_processor ([`~transformers.BlipImageProcessor`]):
            Prepares the images; the torchvision or the PIL variant.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The language model's tokenizer, with `image_token` as a special token.
        num_image_tokens (`int`, *optional*, defaults to 32):
            Visual tokens of an image: `config.image_seq_length` of the model.
        image_token (`str`, *optional*, defaults to `"<ImageHere>"`):
            The placeholder.
        end_symbol (`str`, *optional*):
            What ends an answer: `###`, `</s>`, ... Cut off by `post_process_image_text_to_text`, and put behind the
            captions of stage 2.
        default_instruction (`str`, *optional*):
            What a picture alone is asked, in a conversation. Without one, as after stage 1, the picture alone is
            continued.
        chat_template (`dict[str, str]` or `str`, *optional*):
            Jinja templates: `"default"` for conversations, `"training"` for the prompts of stage 2.
    """

    valid_processor_kwargs = ProcessingKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 32,
        image_token: str = "<ImageHere>",
        end_symbol: str | None = None,
        default_instruction: str | None = None,
        chat_template: dict[str, str] | str | None = None,
        **kwargs: Any,
    ):
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if image_token not in tokenizer.get_vocab():
            raise ValueError(
                f"The tokenizer has no token {image_token!r}. Expected it as a special token: build the processor "
                "with `build_processor`, or add it with `tokenizer.add_special_tokens`."
            )
        self.end_symbol = end_symbol
        self.default_instruction = default_instruction
        tokenizer.padding_side = "left"  # for generation; `save_pretrained` forgets it
        if isinstance(tokenizer, LlamaTokenizer):
            # `save_pretrained` forgets it, and without it the text after a special token is split differently.
            tokenizer.init_kwargs["legacy"] = tokenizer.legacy
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__dict__.pop("auto_map", None)  # of the code that is saved beside it, not of this object

    def prepare_inputs_layout(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        # transformers' own loading drops transparency onto whatever colour lies below it, and clips 16 bits.
        return super().prepare_inputs_layout(images=_load_all(images), text=text, **kwargs)

    def validate_inputs(self, images: ImageInput | None = None, text: list[str] | None = None, **kwargs: Any) -> None:
        """Checks that each text has as many placeholders as images.

        Raises:
            `ValueError`: If one has not.
        """
        if text is not None:
            self._check_placeholders(text, images)
        super().validate_inputs(images=images, text=text, **kwargs)

    def _check_placeholders(self, text: list[str], images: ImageInput | None) -> None:
        found = [sample.count(self.image_token) for sample in text]
        if isinstance(images, (list, tuple)) and images and isinstance(images[0], (list, tuple)):
            given = [len(group) for group in images]
        else:  # not said which image is for which text
            found, given = [sum(found)], [0 if images is None else len(make_flat_list_of_images(images))]
        if found != given:
            raise ValueError(
                f"The number of {self.image_token} tokens in the prompts should be the same as the number of images: "
                f"found {', '.join(map(str, found))} placeholders and {', '.join(map(str, given))} images."
            )

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> MultiModalData:
        """How many visual tokens images of some sizes, (height, width), become. vLLM asks."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        tokenize: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Renders a conversation, as [`~ProcessorMixin.apply_chat_template`] does.

        A placeholder that somebody typed into a text stays plain text, and never becomes the place of an image.

        Raises:
            `ValueError`: If a text holds a placeholder and `tokenize` is `False`, where nothing could tell it from the
                place of an image.
        """
        conversation = copy.copy(conversation)
        if _mentions(conversation, self.image_token):
            if not (tokenize and _CAN_SANITIZE):
                raise ValueError(
                    f"A text of the conversation contains {self.image_token}, which is the place of an image in the "
                    "rendered prompt. Render it with `tokenize=True`, for which a recent transformers keeps it as "
                    "plain text, or remove it."
                )
            kwargs["sanitize_control_tokens"] = True
        return super().apply_chat_template(conversation, chat_template, tokenize=tokenize, **kwargs)

    def image_prompt(self) -> str:
        """What a picture alone is asked: `default_instruction` in a conversation, or nothing but the picture, which a
        stage-1 model continues.

        Returns:
            `str`: A prompt with one placeholder, which starts with BOS: to be tokenized with
            `add_special_tokens=False`.
        """
        if self.default_instruction is None:
            return (self.tokenizer.bos_token or "") + self.image_token
        content = [{"type": "image"}, {"type": "text", "text": self.default_instruction}]
        return self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    @property
    def caption_end_ids(self) -> list[int]:
        """Ids of the tokens that end a stage-1 caption, which was trained with a newline behind it."""
        encode = self.tokenizer.encode
        return sorted({encode(text, add_special_tokens=False)[-1] for text in ("a\n", "a.\n")})

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Decodes answers, without the end symbol and white space around them.

        Args:
            generated_outputs (`torch.Tensor` of shape `(batch_size, sequence_length)`):
                Generated ids, without the prompt's.
            skip_special_tokens (`bool`, *optional*, defaults to `True`):
                Whether to leave out special tokens.

        Returns:
            `list[str]`: The answers.
        """
        texts = self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [text.strip().removesuffix(self.end_symbol or "").strip() for text in texts]


def _load_all(images: Any) -> Any:
    if isinstance(images, (list, tuple)):
        return [_load_all(image) for image in images]
    if images is None or is_numpy_array(images) or is_torch_tensor(images):
        return images
    return load_rgb_image(images)


def _mentions(conversation: Any, token: str) -> bool:
    """Whether a text of the conversation, not one of its images, contains a token."""
    if isinstance(conversation, dict):
        if conversation.get("type", "text") != "text":
            return False
        return any(_mentions(conversation[key], token) for key in ("content", "text") if key in conversation)
    if isinstance(conversation, str):
        return token in conversation
    if isinstance(conversation, (list, tuple)):
        return any(_mentions(part, token) for part in conversation)
    return False


__all__ = ["MiniGPT4Processor"]
