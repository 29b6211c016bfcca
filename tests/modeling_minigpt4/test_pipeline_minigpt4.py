import logging
import subprocess
import sys

import datasets
import pytest
from transformers import ImageTextToTextPipeline, pipeline

from modeling_minigpt4 import MiniGPT4Pipeline, MiniGPT4Processor
from tests.recipes import lines_of_ours, question


CAPTION_END_IDS = MiniGPT4Processor.caption_end_ids


@pytest.fixture
def folder(model, processor, tmp_path):
    """A stage-1 checkpoint."""
    model.save_pretrained(tmp_path / "checkpoint", projection_only=True)
    processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def pipe(folder):
    return pipeline("image-to-text", model=str(folder), max_new_tokens=6)


def answer_of(result):
    assert isinstance(result, list)
    assert [sorted(one) for one in result] == [["generated_text"]]
    assert isinstance(result[0]["generated_text"], str)
    return result[0]["generated_text"]


@pytest.mark.parametrize("task", ["image-to-text", "image-text-to-text"])
def test_both_task_names_give_the_pipeline(folder, task):
    assert type(pipeline(task, model=str(folder))) is MiniGPT4Pipeline


def test_a_picture_may_be_a_path_an_object_or_in_a_list(pipe, pictures, tmp_path):
    path = tmp_path / "picture.png"
    pictures[0].save(path)
    expected = answer_of(pipe(pictures[0]))
    assert answer_of(pipe(str(path))) == expected
    assert answer_of(pipe({"image": pictures[0]})) == expected
    answers = pipe([str(path), *pictures])
    assert [answer_of(one) for one in answers][:2] == [expected, expected]
    assert len(answers) == 4
    assert answer_of(next(iter(pipe(picture for picture in pictures)))) == expected


def test_a_picture_alone_is_continued_after_stage_1_and_asked_after_stage_2(model, processor, pictures):
    def answer(prompt, **kwargs):
        inputs = processor(images=pictures[0], text=prompt, add_special_tokens=False, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=6, **kwargs)[:, inputs["input_ids"].shape[1] :]
        return processor.post_process_image_text_to_text(tokens)[0]

    stops = [*model.generation_config.eos_token_id, *processor.caption_end_ids]
    pipe = pipeline("image-to-text", model=model, processor=processor, max_new_tokens=6)
    bos_token = processor.tokenizer.bos_token
    assert answer_of(pipe(pictures[0])) == answer(bos_token + "<ImageHere>", eos_token_id=stops)
    processor.default_instruction = "Describe this image in detail."
    prompt = processor.apply_chat_template(question(processor.default_instruction), add_generation_prompt=True)
    assert answer_of(pipe(pictures[0])) == answer(prompt)
    assert answer_of(pipe(pictures[0], text="Describe this image in detail.")) == answer(prompt)


def test_each_picture_may_have_its_own_text(pipe, pictures):
    texts = ["What is it?", "A cat?"]
    answers = pipe(pictures[:2], text=texts)
    for answer, picture, text in zip(answers, pictures, texts, strict=False):
        assert answer_of(answer) == answer_of(pipe(picture, text=text))
    with pytest.raises(ValueError, match="3 pictures and 2 texts"):
        pipe(pictures, text=texts)


def test_a_chat_is_continued(pipe, pictures):
    chat = question("What is in the picture?")
    chat[0]["content"][0]["image"] = pictures[0]
    for result in (pipe(chat), pipe(text=chat), pipe([chat])[0]):
        last = result[0]["generated_text"][-1]
        assert last["role"] == "assistant"
        assert last["content"] == answer_of(pipe(pictures[0], text="What is in the picture?"))


def test_text_alone_is_answered(pipe):
    answer = answer_of(pipe(text="Hello."))
    assert [answer_of(one) for one in pipe(text=["Hello.", "Hello."])] == [answer, answer]


def test_pictures_with_their_texts_come_in_every_form(pipe, pictures):
    expected = [answer_of(pipe(picture, text="A cat?")) for picture in pictures]
    rows = [{"image": picture, "text": "A cat?"} for picture in pictures]
    dataset = datasets.Dataset.from_dict({"image": pictures}).cast_column("image", datasets.Image())
    for answers in (
        pipe(rows),
        pipe(pictures, text="A cat?"),
        pipe((picture for picture in pictures), text="A cat?"),
        pipe(dataset, text="A cat?"),
        pipe(pictures, text="A cat?", batch_size=2),
    ):
        assert [answer_of(one) for one in answers] == expected
    assert pipe([]) == []
    assert answer_of(pipe({"images": pictures, "text": "What differs?"}))


def test_a_batch_of_pictures_stops_as_each_alone_does(model, processor, pictures):
    pipe = pipeline("image-to-text", model=model, processor=processor, max_new_tokens=6)
    free = [answer_of(pipe(picture)) for picture in pictures]
    first = processor.tokenizer.encode("A", add_special_tokens=False)
    assert first
    inputs = processor(
        images=pictures[0], text=processor.image_prompt(), add_special_tokens=False, return_tensors="pt"
    )
    token = int(model.generate(**inputs, max_new_tokens=3)[0, -1])
    type(processor).caption_end_ids = property(lambda self: [token])
    try:
        single = [answer_of(pipe(picture)) for picture in pictures]
        assert single[0] != free[0]
        assert [answer_of(one) for one in pipe(pictures, batch_size=3)] == single
    finally:
        type(processor).caption_end_ids = CAPTION_END_IDS


def test_sampling_gives_several_answers(pipe, pictures):
    result = pipe(pictures[0], generate_kwargs={"do_sample": True, "num_return_sequences": 3})
    assert len(result) == 3


def test_an_unreadable_picture_is_named(pipe, tmp_path):
    path = tmp_path / "torn.jpg"
    path.write_bytes(b"\xff\xd8\xff not a picture")
    with pytest.raises(ValueError, match=r"torn\.jpg cannot be read"):
        pipe(str(path))


def test_other_models_get_the_stock_pipeline(backbones, caplog):
    from transformers import AutoTokenizer, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessorPil

    model = Blip2ForConditionalGeneration.from_pretrained(backbones["blip2"])
    tokenizer = AutoTokenizer.from_pretrained(backbones["llama"])
    processor = Blip2Processor(BlipImageProcessorPil(), tokenizer)
    stock = pipeline("image-text-to-text", model=model, processor=processor)
    assert type(stock) is ImageTextToTextPipeline
    record = logging.LogRecord(
        "transformers.pipelines", logging.WARNING, "", 0, "`image-to-text` was removed", (), None
    )
    assert logging.getLogger("transformers.pipelines").filter(record), "their notice stays"


def test_nothing_is_logged(folder, pictures, tmp_path):
    pictures[0].save(tmp_path / "picture.png")
    code = (
        "import modeling_minigpt4\nfrom transformers import pipeline\n"
        f"pipe = pipeline('image-to-text', model={str(folder)!r})\n"
        f"print(pipe({str(tmp_path / 'picture.png')!r}, max_new_tokens=3))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not lines_of_ours(run.stderr)
