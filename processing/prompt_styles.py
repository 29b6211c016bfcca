"""The prompts that a language model was trained with, and processors that speak them."""

import json
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import AddedToken, PreTrainedTokenizerBase
from transformers.utils import is_torchvision_available
from transformers.utils.chat_template_utils import render_jinja_template

from .processing_minigpt4 import MiniGPT4Processor


if is_torchvision_available():
    from transformers import BlipImageProcessor
else:
    from transformers import BlipImageProcessorPil as BlipImageProcessor

PromptStyle = Literal["vicuna-v0", "llama-2", "minigpt-v2", "native"]
PROMPT_STYLES: tuple[PromptStyle, ...] = ("vicuna-v0", "llama-2", "minigpt-v2", "native")

_TEMPLATES = Path(__file__).with_name("chat_templates")


def build_processor(
    tokenizer: PreTrainedTokenizerBase | str,
    num_image_tokens: int,
    image_size: int,
    prompt_style: PromptStyle = "native",
    *,
    image_token: str = "<ImageHere>",
    default_instruction: str | None = None,
    **image_kwargs: Any,
) -> MiniGPT4Processor:
    """Makes the processor of a new MiniGPT-4.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`):
            The language model's tokenizer, or a repository or folder that has it. The placeholder is added to it.
        num_image_tokens (`int`):
            Visual tokens of an image: `config.image_seq_length` of the model.
        image_size (`int`):
            Side of the square, in pixels, that images are resized to.
        prompt_style (`str`, *optional*, defaults to `"native"`):
            `"vicuna-v0"`, `"llama-2"` and `"minigpt-v2"` are the original's; `"native"` is the language model's own
            chat template.
        image_token (`str`, *optional*, defaults to `"<ImageHere>"`):
            The placeholder.
        default_instruction (`str`, *optional*):
            What a picture alone is asked. See [`MiniGPT4Processor`].
        image_kwargs:
            Passed to the image processor, such as `image_mean` and `image_std` where they are not CLIP's.

    Returns:
        [`MiniGPT4Processor`]: The processor.

    Raises:
        `ValueError`: If the style is unknown, if it is `"native"` and the tokenizer has no chat template, or if it is
            another and the tokenizer is a LLaMA's that was opened with `legacy=False`.
    """
    if isinstance(tokenizer, str):
        # The original tokenizes piece by piece, and SentencePiece puts a space before each: `legacy` keeps it.
        kwargs = {} if prompt_style == "native" else {"legacy": True}
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, **kwargs)
    if prompt_style != "native" and isinstance(tokenizer, LlamaTokenizer) and not tokenizer.legacy:
        raise ValueError(
            f"Got a LlamaTokenizer with legacy=False for the prompt style `{prompt_style}`, which was trained with "
            "the tokens of legacy=True. Expected the tokenizer's folder, or one opened with `legacy=True`."
        )
    chat_template, end_symbol = _prompts_of(prompt_style, tokenizer)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(image_token, special=True, normalized=False)]}
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # adding one would change the vocabulary
    tokenizer.chat_template = None  # the processor's knows images
    return MiniGPT4Processor(
        BlipImageProcessor(size={"height": image_size, "width": image_size}, **image_kwargs),
        tokenizer,
        num_image_tokens=num_image_tokens,
        image_token=image_token,
        end_symbol=end_symbol,
        default_instruction=default_instruction,
        chat_template=chat_template,
    )


def configure_generation(model: PreTrainedModel, processor: MiniGPT4Processor) -> None:
    """Tells a model where an answer ends, so that `generate` stops there without a tokenizer.

    Args:
        model ([`MiniGPT4ForConditionalGeneration`]):
            Its `generation_config` and its `config.stop_sequences` are changed.
        processor ([`MiniGPT4Processor`]):
            Knows the end symbol.

    Raises:
        `ValueError`: If the two differ in the placeholder's id, or in the visual tokens of an image.
    """
    theirs = (model.config.image_token_id, model.config.image_seq_length)
    ours = (processor.image_token_id, processor.num_image_tokens)
    if theirs != ours:
        raise ValueError(
            f"The model has the placeholder id {theirs[0]} and {theirs[1]} visual tokens for an image, the processor "
            f"{ours[0]} and {ours[1]}. Expected the same: build the processor with the language model's tokenizer and "
            "`model.config.image_seq_length`."
        )
    tokenizer = processor.tokenizer
    sequences = _tokenizations(tokenizer, processor.end_symbol) if processor.end_symbol else []
    single = {sequence[0] for sequence in sequences if len(sequence) == 1} | {tokenizer.eos_token_id}
    model.generation_config._from_model_config = False
    model.generation_config.eos_token_id = sorted(single)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.stop_sequences = [sequence for sequence in sequences if len(sequence) > 1] or None


def _tokenizations(tokenizer: PreTrainedTokenizerBase, symbol: str) -> list[list[int]]:
    """The ways in which a tokenizer writes a symbol: SentencePiece has one at the start of a text and one inside."""
    found: list[list[int]] = []
    for before in ("", "a", ".", "\n"):
        start = tokenizer.encode(before, add_special_tokens=False)
        whole = tokenizer.encode(before + symbol, add_special_tokens=False)
        if whole[: len(start)] == start and whole[len(start) :] not in found:
            found.append(whole[len(start) :])
    return found


def _prompts_of(style: PromptStyle, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, str], str]:
    """The templates of a style and its end symbol."""
    if style not in PROMPT_STYLES:
        raise ValueError(f"Unknown prompt style {style!r}. Expected one of {', '.join(PROMPT_STYLES)}.")
    if style == "native":
        default, training, end_symbol = _native_prompts(tokenizer)
    else:
        default, training = _read_template(style), _read_template(f"{style}-training")
        end_symbol = "###" if style == "vicuna-v0" else tokenizer.eos_token
    parts = _read_template("content-parts")
    return {"default": parts + default, "training": parts + training}, end_symbol


def _read_template(name: str) -> str:
    return (_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def _native_prompts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """The language model's own template, one turn of it without what it puts first, and its end-of-turn symbol."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError(
            f"The prompt style `native` needs a tokenizer with one chat template, got {type(template).__name__}. "
            "Choose another style, or set `tokenizer.chat_template`."
        )
    question, answer = "QUESTION", "ANSWER"
    first = [{"role": "user", "content": "FIRST"}, {"role": "assistant", "content": answer}]
    second = [*first, {"role": "user", "content": question}]
    rendered, _ = render_jinja_template(
        [first, second], chat_template=template, add_generation_prompt=False, **tokenizer.special_tokens_map
    )
    prompts, _ = render_jinja_template(
        [second], chat_template=template, add_generation_prompt=True, **tokenizer.special_tokens_map
    )
    before, after = prompts[0].removeprefix(rendered[0]).split(question)
    bos_token = tokenizer.bos_token or ""
    if rendered[0].startswith(bos_token) and not before.startswith(bos_token):
        before = bos_token + before
    training = f"{{{{- {json.dumps(before)} ~ messages[-1]['content'] ~ {json.dumps(after)} -}}}}\n"
    end_symbol = rendered[0].split(answer)[-1].strip() or tokenizer.eos_token
    return template, training, end_symbol
