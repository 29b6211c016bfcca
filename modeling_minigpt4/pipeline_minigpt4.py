"""The `image-to-text` pipeline of MiniGPT-4, on pictures alone too."""

import inspect
import logging
from pathlib import Path
from typing import Any

import PIL.Image
from transformers import ImageTextToTextPipeline, PreTrainedModel
from transformers.image_utils import is_valid_image
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils.chat_template_utils import Chat

from .configuration_minigpt4 import MiniGPT4Config


class MiniGPT4Pipeline(ImageTextToTextPipeline):
    """Describes pictures.

    `pipe(image)` asks what the checkpoint was trained to be asked; `pipe(image, text="...")` asks that; a list of
    pictures gives a list of answers. Each answer is `[{"generated_text": "..."}]`. Chats are handled as
    [`~transformers.ImageTextToTextPipeline`] does. A picture is a path, a URL, base64 text or a PIL image.

    For a model of another kind an [`~transformers.ImageTextToTextPipeline`] is made: transformers has one entry for
    all of them.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs["model"]
        if model.config.model_type != MiniGPT4Config.model_type:
            return ImageTextToTextPipeline(*args, **kwargs)
        return super().__new__(cls)

    def check_model_type(self, supported_models: Any) -> None:
        """Nothing to check: transformers' list has its own models only."""

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """Answers about pictures.

        Args:
            images (`str`, `PIL.Image.Image`, `dict`, `list`, iterable, or a chat):
                A picture or several, `{"image": ..., "text": ...}` or several, or a conversation with pictures in it.
            text (`str`, `list[str]`, or a chat, *optional*):
                What to ask, about all pictures or about each. Defaults to what the checkpoint was trained to be asked.
            kwargs:
                Parameters of [`~transformers.ImageTextToTextPipeline`], such as `max_new_tokens`.

        Returns:
            `list[dict]`, or a list of those for several inputs, or a generator for an iterable: `generated_text` holds
            the answer, and for a chat the conversation with the answer.

        Raises:
            `ValueError`: If a picture cannot be read, or if the numbers of pictures and texts differ.
        """
        if _is_chat(text) or (text is None and _is_chat(images)):
            return super().__call__(images, text, **kwargs)
        if images is None and text is None:
            raise ValueError("Expected a picture, a text or a chat, got none.")
        questions = _as_questions(images, text)
        return super(ImageTextToTextPipeline, self).__call__(questions, **kwargs) if questions else []

    def preprocess(self, inputs: Any = None, timeout: float | None = None, **kwargs: Any) -> Any:
        if isinstance(inputs, Chat) or _is_chat(inputs):
            return super().preprocess(inputs if isinstance(inputs, Chat) else Chat(inputs), timeout, **kwargs)
        question = inputs if isinstance(inputs, dict) else _question(inputs, None)
        images = question["image"] if "image" in question else question["images"]
        images = images if isinstance(images, (list, tuple)) else [images]
        text = question.get("text") or self.processor.default_instruction
        if text is None:
            processor_kwargs = {**(kwargs.pop("processor_kwargs", None) or {}), **kwargs, "add_special_tokens": False}
            prompt = self.processor.image_prompt()
            model_inputs = self.processor(images=images, text=prompt, return_tensors="pt", **processor_kwargs)
            model_inputs = model_inputs.to(dtype=self.dtype)
        else:
            pictures = [{"type": "image", "image": image} for image in images if image is not None]
            messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]
            model_inputs = super().preprocess(Chat(messages), timeout, **kwargs)
        model_inputs["text"] = text
        return model_inputs

    def _forward(self, model_inputs: Any, generate_kwargs: dict[str, Any] | None = None) -> Any:
        prompts = model_inputs["text"] if isinstance(model_inputs["text"], list) else [model_inputs["text"]]
        if all(prompt is None for prompt in prompts):
            # A stage-1 model ends a caption with a newline.
            known = self.model.generation_config.eos_token_id
            known = [] if known is None else known if isinstance(known, list) else [known]
            generate_kwargs = {"eos_token_id": [*known, *self.processor.caption_end_ids], **(generate_kwargs or {})}
        prompt_length = model_inputs["input_ids"].shape[1]
        outputs = super()._forward(model_inputs, generate_kwargs)
        outputs["generated_sequence"] = outputs["generated_sequence"][..., prompt_length:]
        outputs["input_ids"] = outputs["input_ids"][:, :0]  # the answers no longer start with the prompt
        return outputs

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> Any:
        if isinstance(model_outputs["prompt_text"], Chat):
            return super().postprocess(model_outputs, **kwargs)
        skip_special_tokens = kwargs.get("skip_special_tokens")
        texts = self.processor.post_process_image_text_to_text(
            model_outputs["generated_sequence"].flatten(0, -2),
            skip_special_tokens=True if skip_special_tokens is None else skip_special_tokens,
        )
        return [{"generated_text": text} for text in texts]


def _as_questions(images: Any, text: str | list[str] | None) -> Any:
    """What the pipeline is asked: a question, a list of them, or a generator of them."""
    if isinstance(images, dict) or _is_picture(images):
        return _question(images, text)
    if images is None:
        return _question(None, text) if isinstance(text, str) else [_question(None, one) for one in text or []]
    if not isinstance(images, (list, tuple)):  # a data set or a generator
        return (_question(one, text) for one in images)
    texts = [text] * len(images) if text is None or isinstance(text, str) else list(text)
    if len(texts) != len(images):
        raise ValueError(f"Got {len(images)} pictures and {len(texts)} texts. Expected one text, or one each.")
    return [_question(image, one) for image, one in zip(images, texts, strict=True)]


def _is_picture(value: Any) -> bool:
    return isinstance(value, (str, bytes, Path, PIL.Image.Image)) or is_valid_image(value)


def _is_chat(value: Any) -> bool:
    """Whether it is a conversation, or a list of conversations."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    first = value[0][0] if isinstance(value[0], (list, tuple)) and value[0] else value[0]
    return isinstance(first, dict) and "role" in first


def _question(image: Any, text: Any) -> dict[str, Any]:
    if isinstance(image, dict):
        return image if text is None else {**image, "text": text}
    return {"image": image, "text": text}


class _RenamedTaskFilter(logging.Filter):
    """Drops the notice that `image-to-text` was renamed where the pipeline is MiniGPT-4's, for which both names hold.
    The model is known to the call of `pipeline` that logs it, and to nothing else."""

    def filter(self, record: logging.LogRecord) -> bool:
        if "image-to-text" not in str(record.msg):
            return True
        frame = inspect.currentframe()
        while frame is not None and frame.f_code.co_name != "pipeline":
            frame = frame.f_back
        if frame is None:
            return True
        model, config = frame.f_locals.get("model"), frame.f_locals.get("config")
        if config is None and isinstance(model, PreTrainedModel):
            config = model.config
        return config is None or config.model_type != MiniGPT4Config.model_type


def register_pipeline() -> None:
    """Puts [`MiniGPT4Pipeline`] into transformers' registry."""
    PIPELINE_REGISTRY.supported_tasks["image-text-to-text"]["impl"] = MiniGPT4Pipeline
    logger = logging.getLogger("transformers.pipelines")
    if not any(isinstance(known, _RenamedTaskFilter) for known in logger.filters):
        logger.addFilter(_RenamedTaskFilter())


__all__ = ["MiniGPT4Pipeline"]
