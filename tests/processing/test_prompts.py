"""Prompts and training examples: the strings and ids that the original implementation made."""

import json

import pytest
import torch
from jinja2.exceptions import TemplateError
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from processing import build_processor, stage1_example, stage2_example
from tests.conftest import FIXTURES
from tests.recipes import question


STYLES = {"vicuna": "vicuna-v0", "llama2": "llama-2", "v2": "minigpt-v2"}
NUM_IMAGE_TOKENS = 3


@pytest.fixture(params=list(STYLES))
def expected(request):
    return json.loads((FIXTURES / "original" / request.param / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def processor(backbones, expected):
    return build_processor(backbones["llama"], NUM_IMAGE_TOKENS, 28, STYLES[expected["variant"]])


def ids_of(processor, segments):
    """Ids around an image, with BOS before the first."""
    bos, image = processor.tokenizer.bos_token_id, processor.image_token_id
    first, second = segments
    first = first if first[0] == bos else [bos, *first]
    return [*first, *[image] * NUM_IMAGE_TOKENS, *second]


def test_a_conversation_is_written_as_the_original_writes_it(processor, expected, pictures):
    bos = processor.tokenizer.bos_token
    first = question(expected["chat_question"])
    prompt = processor.apply_chat_template(first, add_generation_prompt=True)
    assert prompt == bos + expected["chat_prompt_turn1"]
    second = [
        *first,
        {"role": "assistant", "content": [{"type": "text", "text": expected["chat_answer_given"]}]},
        {"role": "user", "content": expected["chat_question2"]},
    ]
    prompt = processor.apply_chat_template(second, add_generation_prompt=True)
    assert prompt == bos + expected["chat_prompt_turn2"]
    second[0]["content"][0]["image"] = pictures[0]
    ids = processor.apply_chat_template(second, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert list(ids["input_ids"][0]) == ids_of(processor, expected["chat2_segment_token_ids"])


@pytest.mark.parametrize("with_tag", [True, False])
def test_training_examples_become_the_originals_ids(processor, expected, pictures, with_tag):
    instruction = expected["stage2_instruction"]
    if not with_tag:
        instruction = instruction.removeprefix("<Img><ImageHere></Img> ")
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    for picture, caption, answer in zip(
        pictures, expected["captions"], expected["stage2_answer_token_ids"], strict=False
    ):
        example = stage2_example(picture, caption, processor, instruction)
        assert sorted(example) == ["completion", "images", "prompt"]
        batch = collator([example])
        prompt = ids_of(processor, expected["stage2_segment_token_ids"])
        assert batch["input_ids"][0].tolist() == prompt + answer
        assert batch["labels"][0].tolist() == [-100] * len(prompt) + answer


def test_stage_1_has_no_instruction(processor, expected, pictures):
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    answers = expected["stage1_answer_token_ids"]
    batch = collator(
        [stage1_example(one, text, processor) for one, text in zip(pictures, expected["captions"], strict=False)]
    )
    for row, answer in enumerate(answers):
        ids = [processor.tokenizer.bos_token_id, *[processor.image_token_id] * NUM_IMAGE_TOKENS, *answer]
        kept = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][kept].tolist() == ids
        assert batch["labels"][row][batch["labels"][row] != -100].tolist() == answer
    assert torch.equal(
        batch["labels"] == -100,
        (batch["attention_mask"] == 0) | (batch["input_ids"] == 1500) | (batch["input_ids"] == 1),
    )


def test_the_last_answer_of_a_finished_conversation_is_closed(processor, expected):
    chat = [*question("What?"), {"role": "assistant", "content": "A cat."}]
    assert processor.apply_chat_template(chat).endswith("A cat." + expected["end_sym"])
    assert processor.apply_chat_template(chat, continue_final_message=True).endswith("A cat.")


def test_a_system_text_replaces_the_originals(processor):
    chat = [{"role": "system", "content": "Be brief."}, *question("What?")]
    prompt = processor.apply_chat_template(chat)
    assert prompt.startswith(processor.tokenizer.bos_token + "Be brief.")
    assert "Give the following image" not in prompt


def test_unknown_roles_and_parts_are_refused(processor):
    with pytest.raises(TemplateError, match="got tool"):
        processor.apply_chat_template([*question("What?"), {"role": "tool", "content": "4"}])
    with pytest.raises(TemplateError, match="got video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


def test_a_caption_that_would_be_an_image_slot_is_refused(processor, pictures):
    with pytest.raises(ValueError, match="does not contain <ImageHere>"):
        stage1_example(pictures[0], "a <ImageHere>", processor)
    with pytest.raises(ValueError, match="not empty"):
        stage2_example(pictures[0], " ", processor, "What?")


def test_examples_do_not_change_what_they_are_given(processor, pictures):
    caption = "  Two Dogs!  "
    assert stage1_example(pictures[0], caption, processor)["completion"] == caption + "\n"
    assert stage2_example(pictures[0], caption, processor, "What?")["completion"] == caption + processor.end_symbol


def test_the_native_style_is_the_language_models_own(backbones):
    processor = build_processor(backbones["gpt2"], 2, 32, "native")
    prompt = processor.apply_chat_template(question("What is it?"), add_generation_prompt=True)
    assert prompt == "<|turn|>user\n<Img><ImageHere></Img> What is it?<|end|>\n<|turn|>assistant\n"
    example = stage2_example(None, "A cat.", processor, "What is it?")
    assert (example["prompt"], example["completion"]) == (prompt, "A cat.<|end|>")
    assert processor.end_symbol == "<|end|>"


def test_the_native_training_prompt_has_no_default_system_text(backbones):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(backbones["gpt2"])
    tokenizer.chat_template = "{{ '<|turn|>system\nBe good.<|end|>\n' }}" + tokenizer.chat_template
    processor = build_processor(tokenizer, 2, 32, "native")
    assert "Be good." in processor.apply_chat_template(question("What?"))
    example = stage2_example(None, "A cat.", processor, "What?")
    assert example["prompt"] == "<|turn|>user\n<Img><ImageHere></Img> What?<|end|>\n<|turn|>assistant\n"


def test_a_processor_and_a_model_that_do_not_belong_together_are_refused(backbones):
    from processing import configure_generation
    from tests.recipes import build

    with pytest.raises(ValueError, match=r"placeholder id 1500 and 5 visual tokens .* the processor 1500 and 6"):
        configure_generation(build(backbones, "qformer"), build_processor(backbones["llama"], 6, 28, "vicuna-v0"))


def test_an_unknown_style_is_refused(backbones):
    with pytest.raises(ValueError, match=r"'alpaca'. Expected one of vicuna-v0, llama-2, minigpt-v2, native"):
        build_processor(backbones["llama"], 5, 28, "alpaca")
    with pytest.raises(ValueError, match="needs a tokenizer with one chat template"):
        build_processor(backbones["llama"], 5, 28, "native")
