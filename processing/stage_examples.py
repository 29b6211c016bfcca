"""Training examples of both stages, as TRL's prompt-completion records."""

from pathlib import Path
from typing import Any

from .processing_minigpt4 import MiniGPT4Processor


def stage1_example(image: Any, caption: str, processor: MiniGPT4Processor) -> dict[str, Any]:
    """An example of stage 1, which aligns the two sides: the picture is followed by its caption, without a word of
    instruction.

    Args:
        image: A picture, as the processor takes it.
        caption (`str`): Its caption, used as it is.
        processor ([`MiniGPT4Processor`]): Knows BOS and the placeholder.

    Returns:
        `dict`: `images` (a list of one), `prompt` (BOS and the placeholder), `completion` (the caption and a newline).

    Raises:
        `ValueError`: If the caption is empty, or contains the placeholder.
    """
    prompt = (processor.tokenizer.bos_token or "") + processor.image_token
    return {"images": [image], "prompt": prompt, "completion": _checked(caption, processor) + "\n"}


def stage2_example(image: Any, caption: str, processor: MiniGPT4Processor, instruction: str) -> dict[str, Any]:
    """An example of stage 2, which teaches the model to answer: the picture and an instruction in the training form of
    the conversation template, and a long description.

    Args:
        image: A picture, as the processor takes it.
        caption (`str`): Its description, used as it is.
        processor ([`MiniGPT4Processor`]): Knows the template and the end symbol.
        instruction (`str`): What is asked. A leading `<Img><ImageHere></Img>`, as in the published instructions, may
            be there or not.

    Returns:
        `dict`: `images` (a list of one), `prompt` (the training template), `completion` (the caption and the end
        symbol).

    Raises:
        `ValueError`: If the caption or the instruction is empty, or contains the placeholder.
    """
    instruction = instruction.removeprefix(f"<Img>{processor.image_token}</Img>").lstrip()
    content = [{"type": "image"}, {"type": "text", "text": _checked(instruction, processor)}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], chat_template="training")
    completion = _checked(caption, processor) + (processor.end_symbol or "")
    return {"images": [image], "prompt": prompt, "completion": completion}


def stage2_instructions() -> list[str]:
    """The four instructions that the original trains stage 2 with, from its `prompts/alignment.txt`, without the image
    in front of them."""
    path = Path(__file__).with_name("alignment_instructions.txt")
    return path.read_text(encoding="utf-8").splitlines()


def _checked(text: str, processor: MiniGPT4Processor) -> str:
    if not text.strip() or processor.image_token in text:
        raise ValueError(
            f"Got the text {text!r}. Expected one that is not empty and does not contain {processor.image_token}, "
            "which would become the place of an image."
        )
    return text
