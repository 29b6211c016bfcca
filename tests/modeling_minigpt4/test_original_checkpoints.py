"""Checkpoints of the original release: the folders that they are converted to compute what the original computes."""

import json

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from modeling_minigpt4.convert_minigpt4_original_to_hf import ConversionArguments, convert
from processing import stage1_example, stage2_example
from tests.recipes import ORIGINAL, ORIGINAL_STYLES, original_files


TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def pictures():
    return [Image.open(ORIGINAL / f"image_{index}.png") for index in (0, 1)]


@pytest.fixture(
    scope="module", params=[(variant, kind) for variant in ORIGINAL_STYLES for kind in ("full", "projection")]
)
def converted(request, tmp_path_factory):
    """The variant, a model opened from the converted folder, its processor, and what the original says."""
    variant, kind = request.param
    root = tmp_path_factory.mktemp(variant)
    arguments = ConversionArguments(**original_files(variant), output=str(root / "converted"), dtype="float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIGPT4_CACHE", str(root / "cache"))
        arguments.projection_only = arguments.keep_lora = kind == "projection"
        convert(arguments)
        model = AutoModel.from_pretrained(arguments.output)
    if variant == "v2" and kind == "projection":
        model = PeftModel.from_pretrained(model, arguments.output, subfolder="adapter").eval()
    expected = json.loads((ORIGINAL / variant / "expected.json").read_text(encoding="utf-8"))
    expected |= load_file(ORIGINAL / variant / "expected.safetensors")
    return variant, model, AutoProcessor.from_pretrained(arguments.output), expected


def chat(processor, expected, picture, turns):
    """The inputs of the first or the second turn of the original's conversation."""
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture}, {"type": "text", "text": expected["chat_question"]}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": expected["chat_answer_given"]}]},
        {"role": "user", "content": [{"type": "text", "text": expected["chat_question2"]}]},
    ]
    return processor.apply_chat_template(
        messages[: 2 * turns - 1],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_pixels_and_visual_tokens_are_the_originals(converted, pictures):
    _, model, processor, expected = converted
    pixel_values = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values, expected["pixel_values"], atol=1e-5, rtol=0)
    tokens = model.get_image_features(pixel_values).pooler_output
    torch.testing.assert_close(tokens, expected["image_embeds_projected"], atol=TOLERANCE, rtol=0)


def test_training_losses_are_the_originals(converted, pictures):
    _, model, processor, expected = converted
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    pairs = list(zip(pictures, expected["captions"], strict=True))
    stage1 = [stage1_example(image, caption, processor) for image, caption in pairs]
    stage2 = [stage2_example(image, caption, processor, expected["stage2_instruction"]) for image, caption in pairs]
    with torch.no_grad():
        if "stage1_loss" in expected:
            assert model(**collate(stage1)).loss.item() == pytest.approx(expected["stage1_loss"].item(), abs=TOLERANCE)
        assert model(**collate(stage2)).loss.item() == pytest.approx(expected["stage2_loss"].item(), abs=TOLERANCE)
        for example, loss in zip(stage2, expected["stage2_loss_each"].tolist(), strict=True):
            assert model(**collate([example])).loss.item() == pytest.approx(loss, abs=TOLERANCE)


@pytest.mark.parametrize("turns", [1, 2])
def test_chat_logits_are_the_originals(converted, pictures, turns):
    _, model, processor, expected = converted
    with torch.no_grad():
        logits = model(**chat(processor, expected, pictures[0], turns)).logits[:, -1]
    name = "chat_logits_last" if turns == 1 else "chat2_logits_last"
    torch.testing.assert_close(logits, expected[name], atol=TOLERANCE, rtol=0)


def test_greedy_answers_are_the_originals(converted, pictures):
    _, model, processor, expected = converted
    inputs = chat(processor, expected, pictures[0], 1)
    greedy = {"do_sample": False, "top_p": None, "repetition_penalty": 1.0, "max_new_tokens": 24}
    answer = model.generate(**inputs, **greedy)[0, inputs["input_ids"].shape[1] :]
    assert answer.tolist() == expected["chat_greedy_ids"][0, 1:].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_its_rows_give(converted, pictures, side):
    _, model, processor, expected = converted
    single = [chat(processor, expected, picture, turns) for picture, turns in zip(pictures, (1, 2), strict=True)]
    length = max(inputs["input_ids"].shape[1] for inputs in single)
    batch = {"pixel_values": torch.cat([inputs["pixel_values"] for inputs in single])}
    for name in ("input_ids", "attention_mask"):
        rows = []
        for inputs in single:
            gap = length - inputs[name].shape[1]
            rows.append(torch.nn.functional.pad(inputs[name], (gap, 0) if side == "left" else (0, gap)))
        batch[name] = torch.cat(rows)
    with torch.no_grad():
        logits = model(**batch).logits
        for row, inputs in enumerate(single):
            kept = logits[row][batch["attention_mask"][row].bool()]
            torch.testing.assert_close(kept, model(**inputs).logits[0], atol=TOLERANCE, rtol=0)


def test_the_vision_side_gives_the_same_with_eager_attention(converted, pictures):
    _, model, processor, _ = converted
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    parts = {name: "sdpa" for name in ("vision_config", "qformer_config") if getattr(base.config, name) is not None}
    pixel_values = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    tokens = {}
    for attention in ("sdpa", "eager"):
        base.set_attn_implementation(dict.fromkeys(parts, attention))
        tokens[attention] = base.get_image_features(pixel_values).pooler_output
    torch.testing.assert_close(tokens["eager"], tokens["sdpa"], atol=TOLERANCE, rtol=0)


def test_the_folder_is_complete(converted):
    """Generation settings of the original's chat, its end symbol, and what a picture alone is asked."""
    _, model, processor, expected = converted
    generation = model.generation_config
    assert (generation.do_sample, generation.top_p, generation.temperature) == (True, 0.9, 1.0)
    assert (generation.repetition_penalty, generation.max_new_tokens) == (1.05, 300)
    assert processor.end_symbol == expected["end_sym"]
    assert processor.default_instruction == "Describe this image in detail."
    end = processor.tokenizer.encode(expected["end_sym"], add_special_tokens=False)
    assert end in [[token] for token in generation.eos_token_id] + (model.config.stop_sequences or [])


def test_merged_and_kept_lora_matrices_give_the_same(tmp_path, pictures):
    """... and neither is what the language model says without them."""
    logits = {}
    for name, keep in (("merged", False), ("kept", True)):
        folder = str(tmp_path / name)
        convert(ConversionArguments(**original_files("v2"), output=folder, dtype="float32", keep_lora=keep))
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        inputs = processor(images=pictures[0], text=processor.image_prompt(), return_tensors="pt")
        with torch.no_grad():
            logits[name] = model(**inputs).logits
            if keep:
                adapted = PeftModel.from_pretrained(model, folder, subfolder="adapter").eval()
                logits["adapted"] = adapted(**inputs).logits
                logits["unloaded"] = adapted.merge_and_unload()(**inputs).logits
    torch.testing.assert_close(logits["adapted"], logits["merged"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logits["unloaded"], logits["merged"], atol=TOLERANCE, rtol=0)
    assert not torch.allclose(logits["kept"], logits["merged"], atol=0.01)


@pytest.mark.parametrize("variant", ORIGINAL_STYLES)
@pytest.mark.parametrize("projection_only", [False, True])
def test_a_converted_folder_saves_and_loads_without_changing_a_bit(variant, projection_only, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT4_CACHE", str(tmp_path / "cache"))
    converted = str(tmp_path / "converted")
    convert(
        ConversionArguments(
            **original_files(variant), output=converted, projection_only=projection_only, keep_lora=projection_only
        )
    )
    model = AutoModel.from_pretrained(converted)
    assert {weight.dtype for weight in model.model.vision_tower.parameters()} == {torch.float16}
    model.save_pretrained(tmp_path / "saved", projection_only=projection_only)
    again = AutoModel.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())
