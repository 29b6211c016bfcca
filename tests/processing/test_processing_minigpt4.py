import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoProcessor

from processing import build_processor
from processing.processing_minigpt4 import _CAN_SANITIZE
from tests.recipes import question


IMAGE_ID = 1500


@pytest.fixture
def processor(backbones):
    return build_processor(backbones["llama"], 5, 28, "vicuna-v0")


def count_of(ids):
    return int((torch.as_tensor(ids) == IMAGE_ID).sum())


def test_text_and_pictures_become_model_inputs(processor, pictures):
    inputs = processor(
        text=["<ImageHere> a", "<ImageHere> and <ImageHere>"],
        images=[[pictures[0]], pictures[1:]],
        padding=True,
        return_tensors="pt",
    )
    assert sorted(inputs) == ["attention_mask", "input_ids", "pixel_values"]
    assert inputs["pixel_values"].shape == (3, 3, 28, 28)
    assert [count_of(row) for row in inputs["input_ids"]] == [5, 10]
    assert inputs["attention_mask"][0, 0] == 0, "padded on the left, for generation"


def test_pixel_values_are_cropped_from_nothing_and_normalised_as_clips(processor):
    picture = PIL.Image.new("RGB", (90, 30), (255, 0, 0))
    values = processor(images=picture, text="<ImageHere>", return_tensors="pt")["pixel_values"][0]
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    expected = (torch.tensor([1.0, 0, 0]) - mean) / std
    torch.testing.assert_close(values, expected[:, None, None].expand(3, 28, 28), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 3), (2, 500)])
def test_the_smallest_pictures_are_pictures(processor, size):
    values = processor(images=PIL.Image.new("RGB", size, (255, 0, 0)), text="<ImageHere>", return_tensors="pt")
    channels = values["pixel_values"][0].flatten(1)
    torch.testing.assert_close(channels, channels[:, :1].expand_as(channels), atol=1e-4, rtol=1e-4)
    assert channels[0, 0] > 1.5
    assert channels[1, 0] < -1.5


def test_a_picture_with_transparency_stands_on_white(processor, tmp_path):
    PIL.Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    white = processor(images=PIL.Image.new("RGB", (8, 8), "white"), text="<ImageHere>", return_tensors="pt")
    for source in (str(tmp_path / "clear.png"), PIL.Image.open(tmp_path / "clear.png")):
        values = processor(images=source, text="<ImageHere>", return_tensors="pt")
        assert torch.equal(values["pixel_values"], white["pixel_values"])
    content = [{"type": "image", "path": str(tmp_path / "clear.png")}, {"type": "text", "text": "What is it?"}]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(chat["pixel_values"], white["pixel_values"])


def test_arrays_and_tensors_are_taken_as_they_are(processor, pictures):
    expected = processor(images=pictures[0], text="<ImageHere>", return_tensors="pt")["pixel_values"]
    array = np.asarray(pictures[0])
    for image in (array, torch.from_numpy(array.copy()).permute(2, 0, 1)):
        given = processor(images=image, text="<ImageHere>", return_tensors="pt")["pixel_values"]
        assert torch.equal(given, expected)


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("no place", 1, "found 0 placeholders and 1 images"),
        ("<ImageHere>", 0, "found 1 placeholders and 0 images"),
        ("<ImageHere><ImageHere>", 1, "found 2 placeholders and 1 images"),
    ],
)
def test_placeholders_and_images_that_do_not_match_are_refused(processor, pictures, text, count, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=pictures[:count] or None)


def test_images_of_another_row_do_not_make_up_for_missing_ones(processor, pictures):
    with pytest.raises(ValueError, match="found 1, 2 placeholders and 2, 1 images"):
        processor(text=["<ImageHere>", "<ImageHere><ImageHere>"], images=[pictures[:2], pictures[2:]])


def test_a_truncation_that_would_cut_visual_tokens_is_refused(processor, pictures):
    assert (
        count_of(
            processor(text="<ImageHere> a b c d e", images=pictures[0], truncation=True, max_length=8)["input_ids"]
        )
        == 5
    )
    with pytest.raises(ValueError, match=r"[Tt]runcat"):
        processor(text="a <ImageHere>", images=pictures[0], truncation=True, max_length=4)


def test_an_unreadable_picture_is_named(processor, tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"torn\.jpg cannot be read"):
        processor(text="<ImageHere>", images=str(tmp_path / "torn.jpg"))


@pytest.mark.skipif(not _CAN_SANITIZE, reason="needs a later transformers")
@pytest.mark.parametrize("style", ["vicuna-v0", "llama-2", "minigpt-v2", "native"])
def test_a_placeholder_that_somebody_types_stays_plain_text(backbones, pictures, style):
    processor = build_processor(backbones["gpt2" if style == "native" else "llama"], 5, 28, style)
    typed = "What does <ImageHere> mean?"
    chat = question(typed)
    chat[0]["content"][0]["image"] = pictures[0]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = inputs["input_ids"][0]
    assert int((ids == processor.image_token_id).sum()) == 5
    text_ids = ids[ids != processor.image_token_id]
    assert typed in processor.decode(text_ids)
    assert len(inputs["pixel_values"]) == 1
    text_only = [{"role": "user", "content": typed}]
    ids = processor.apply_chat_template(text_only, tokenize=True)[0]
    assert processor.image_token_id not in list(ids)
    with pytest.raises(ValueError, match="contains <ImageHere>, which is the place of an image"):
        processor.apply_chat_template(text_only)


def test_the_conversation_of_the_caller_is_not_changed(processor, pictures):
    chat = question("What is it?")
    chat[0]["content"][0]["image"] = pictures[0]
    before = [dict(part) for part in chat[0]["content"]]
    processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert chat[0]["content"] == before


def test_a_saved_processor_is_the_same(processor, pictures, tmp_path):
    processor.default_instruction = "Describe this image in detail."
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    assert loaded.chat_template == processor.chat_template
    assert loaded.image_prompt() == processor.image_prompt()
    assert (loaded.end_symbol, loaded.num_image_tokens) == ("###", 5)
    for text in (processor.image_prompt(), "<s>###Human: <Img><ImageHere></Img> a ###Assistant: "):
        expected = processor(text=text, images=pictures[0], return_tensors="pt")
        given = loaded(text=text, images=pictures[0], return_tensors="pt")
        assert all(torch.equal(given[name], expected[name]) for name in expected)
    assert loaded.tokenizer.padding_side == "left"


def test_answers_lose_their_end_symbol(processor):
    ids = [processor.tokenizer.encode(text, add_special_tokens=False) for text in ("A cat. ###", "A ### dog.</s></s>")]
    assert processor.post_process_image_text_to_text(ids) == ["A cat.", "A ### dog."]


def test_vllm_is_told_how_many_tokens_a_picture_takes(processor):
    data = processor._get_num_multimodal_tokens(image_sizes=[[30, 40], [500, 2]])
    assert (data.num_image_tokens, data.num_image_patches) == ([5, 5], [1, 1])


def test_a_tokenizer_without_the_placeholder_is_refused(processor):
    from transformers import AutoTokenizer

    from processing import MiniGPT4Processor

    tokenizer = AutoTokenizer.from_pretrained(processor.tokenizer.name_or_path)
    with pytest.raises(ValueError, match="has no token '<ImageHere>'"):
        MiniGPT4Processor(processor.image_processor, tokenizer)
