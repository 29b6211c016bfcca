import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TextIteratorStreamer

from modeling_minigpt4.generation_minigpt4 import StopSequenceCriteria
from tests.recipes import question


def prompt_inputs(processor, pictures, text="What is in the picture?", count=1):
    prompt = processor.apply_chat_template(question(text, count), add_generation_prompt=True)
    images = [pictures[:count]] if count else None
    return processor(images=images, text=[prompt], add_special_tokens=False, return_tensors="pt")


def generated(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, **kwargs}
    return model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]


def greedy_by_hand(model, inputs, steps=6):
    """Without a cache, without `generate`."""
    ids, tokens = inputs["input_ids"], []
    for _ in range(steps):
        logits = model(input_ids=ids, pixel_values=inputs.get("pixel_values")).logits[:, -1]
        logits[:, model.config.image_token_id : model.config.image_token_id + 1] = -torch.inf
        tokens.append(logits.argmax(-1, keepdim=True))
        ids = torch.cat([ids, tokens[-1]], dim=-1)
    return torch.cat(tokens, dim=-1)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_greedy_decoding_follows_the_logits(model, processor, pictures, count):
    inputs = prompt_inputs(processor, pictures, count=count)
    assert torch.equal(generated(model, inputs), greedy_by_hand(model, inputs))


def test_the_picture_decides_what_is_generated(model, processor, pictures):
    logits = [model(**prompt_inputs(processor, [picture])).logits[:, -1] for picture in pictures]
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


def test_a_batch_generates_what_its_rows_generate(model, processor, pictures):
    texts = ["What is it?", "Tell me a longer story about the cat in the picture.", "A dog?"]
    prompts = [processor.apply_chat_template(question(text), add_generation_prompt=True) for text in texts]
    images = [[picture] for picture in pictures]
    batch = processor(images=images, text=prompts, padding=True, add_special_tokens=False, return_tensors="pt")
    together = generated(model, batch)
    for row, (text, picture) in enumerate(zip(texts, pictures, strict=True)):
        assert torch.equal(together[row], generated(model, prompt_inputs(processor, [picture], text))[0])


def test_beams_agree_with_beams_on_single_rows_with_several_images(model, processor, pictures):
    prompts = [processor.apply_chat_template(question("What?", count)) for count in (2, 1)]
    images = [pictures[:2], pictures[2:]]
    batch = processor(images=images, text=prompts, padding=True, add_special_tokens=False, return_tensors="pt")
    together = generated(model, batch, num_beams=3)
    for row, (prompt, group) in enumerate(zip(prompts, images, strict=True)):
        single = processor(images=[group], text=[prompt], add_special_tokens=False, return_tensors="pt")
        assert torch.equal(together[row], generated(model, single, num_beams=3)[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_features_and_encoder_outputs_made_earlier_give_the_same(model, processor, pictures, beams):
    inputs = prompt_inputs(processor, pictures, count=2)
    expected = generated(model, inputs, num_beams=beams)
    encoded = model.get_image_features(inputs.pop("pixel_values"))
    shape = encoded.pooler_output.shape
    from_features = {**inputs, "image_features": encoded.last_hidden_state}
    from_outputs = {**inputs, "mm_encoder_outputs": {"image": encoded}}
    for given in (from_features, from_outputs, from_outputs):
        assert torch.equal(generated(model, given, num_beams=beams), expected)
    assert encoded.pooler_output.shape == shape, "the caller's outputs are not changed"


def test_sampling_is_repeatable_with_a_seed(model, processor, pictures):
    inputs = prompt_inputs(processor, pictures)
    answers = []
    for _ in range(2):
        torch.manual_seed(5)
        answers.append(generated(model, inputs, do_sample=True, top_p=0.9, num_return_sequences=2))
    assert torch.equal(*answers)


def test_a_streamer_gets_the_same_text(model, processor, pictures):
    inputs = prompt_inputs(processor, pictures)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    tokens = generated(model, inputs, streamer=streamer)
    assert "".join(streamer) == processor.tokenizer.decode(tokens[0])


def test_a_repetition_penalty_counts_what_was_generated_and_not_the_prompt(model, processor, pictures):
    inputs = prompt_inputs(processor, pictures)
    ids, tokens = inputs["input_ids"], []
    for _ in range(6):
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
        logits[model.config.image_token_id : model.config.image_token_id + 1] = -torch.inf
        for token in set(tokens):
            logits[token] = logits[token] / 1.7 if logits[token] > 0 else logits[token] * 1.7
        tokens.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=-1)
    assert generated(model, inputs, repetition_penalty=1.7)[0].tolist() == tokens


@pytest.mark.parametrize(
    "controls",
    [
        {"no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.3},
        {"encoder_no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.2, "do_sample": True, "top_k": 5},
        {"num_beams": 2, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
        {"bad_words_ids": [[5]], "min_new_tokens": 2},
    ],
    ids=str,
)
def test_no_logits_processor_trips_over_the_placeholder(model, processor, pictures, controls):
    tokens = generated(model, prompt_inputs(processor, pictures), **controls)
    assert tokens.shape == (1, 6)
    assert (tokens < model.config.text_config.vocab_size).all()


def test_the_placeholder_is_never_generated(qformer_model, qformer_processor, pictures):
    inputs = prompt_inputs(qformer_processor, pictures)
    favourite = int(generated(qformer_model, inputs)[0, 0])
    qformer_model.config.image_token_index = favourite
    inputs["input_ids"] = inputs["input_ids"].where(inputs["input_ids"] != 1500, favourite)
    assert favourite not in generated(qformer_model, inputs)[0].tolist()


def test_generation_stops_at_an_end_symbol_of_two_tokens_without_a_tokenizer(model, processor, pictures):
    inputs = prompt_inputs(processor, pictures)
    free = generated(model, inputs)[0].tolist()
    model.config.stop_sequences = [[free[2], free[3]]]
    stopped = generated(model, inputs)[0].tolist()
    assert stopped == free[:4]
    assert generated(model, inputs, num_beams=2).shape[1] <= 6


def test_rows_stop_on_their_own():
    criteria = StopSequenceCriteria([[7, 8], [9]])
    prompt = [[1, 7], [7, 8], [1, 9]]
    assert criteria(torch.tensor([[*row, 5] for row in prompt]), None).tolist() == [False, False, False]
    ids = torch.tensor([[1, 7, 8, 7], [7, 8, 7, 8], [1, 9, 5, 9]])
    assert criteria(ids, None).tolist() == [False, True, True]
    assert StopSequenceCriteria([[7, 8]])(torch.tensor([[1, 7, 8]]), None).tolist() == [False], "7 is the prompt's"


@pytest.mark.parametrize("recipe", ["qformer"], indirect=True)
def test_vicunas_end_symbol_is_known_in_every_way_that_it_is_written(model, processor):
    tokenizer = processor.tokenizer
    ways = [[token] for token in model.generation_config.eos_token_id] + (model.config.stop_sequences or [])
    assert [tokenizer.eos_token_id] in ways
    for text in ("###", "A cat.###", "a cat ###", "a cat\n###"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert any(ids[-len(way) :] == way for way in ways), text


def test_a_static_cache_gives_the_same(model, processor, pictures):
    inputs = prompt_inputs(processor, pictures)
    assert torch.equal(generated(model, inputs, cache_implementation="static"), generated(model, inputs))


def test_a_users_own_logits_processor_is_left_alone(model, processor, pictures):
    own = RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=2)
    generated(model, prompt_inputs(processor, pictures), logits_processor=LogitsProcessorList([own]))
    assert own.prompt_ignore_length == 2


def test_prompt_lookup_is_refused(model, processor, pictures):
    with pytest.raises(ValueError, match=r"prompt_lookup_num_tokens=3. Expected None"):
        generated(model, prompt_inputs(processor, pictures), prompt_lookup_num_tokens=3)
