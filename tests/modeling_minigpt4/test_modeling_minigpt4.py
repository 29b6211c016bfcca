import copy

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Blip2ForConditionalGeneration,
    ConvNextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
)

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Model
from tests.recipes import RECIPES, build, question


def inputs_of(processor, pictures, texts=("What is in the picture?",)):
    conversations = [question(text) for text in texts]
    prompts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    return processor(
        images=[[picture] for picture in pictures[: len(texts)]],
        text=prompts,
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_auto_classes_build_the_generating_model(auto_class):
    text = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = MiniGPT4Config(vision_config=vision, qformer_config=None, text_config=text)
    assert type(auto_class.from_config(config)) is MiniGPT4ForConditionalGeneration


def test_a_forward_pass_gives_a_loss_and_logits(model, processor, pictures):
    inputs = inputs_of(processor, pictures, ["What is it?", "A cat?"])
    outputs = model(**inputs, labels=inputs["input_ids"].where(inputs["attention_mask"] == 1, -100) % 300)
    assert outputs.logits.shape == (*inputs["input_ids"].shape, model.config.text_config.vocab_size)
    assert outputs.loss.isfinite()
    assert outputs.image_hidden_states.shape[:2] == (2, model.config.image_seq_length)


def test_visual_tokens_have_the_spread_of_the_embeddings(model, processor, pictures):
    pixel_values = inputs_of(processor, pictures)["pixel_values"]
    spread = model.get_image_features(pixel_values).pooler_output.std()
    expected = model.get_input_embeddings().weight.std()
    assert 0.4 * expected < spread < 2.5 * expected


def test_the_qformer_path_computes_what_blip2_computes(backbones, qformer_model, qformer_processor, pictures):
    blip2 = Blip2ForConditionalGeneration.from_pretrained(backbones["blip2"])
    pixel_values = qformer_processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    expected = blip2.get_image_features(pixel_values=pixel_values, return_dict=True).qformer_outputs.last_hidden_state
    features = qformer_model.get_image_features(pixel_values).last_hidden_state
    torch.testing.assert_close(features, expected)


def test_without_qformer_the_class_token_goes_and_neighbours_are_merged(backbones, pictures):
    model = build(backbones, "merged")
    pixel_values = torch.randn(2, 3, 32, 32)
    patches = model.model.vision_tower(pixel_values).last_hidden_state[:, 1:]
    features = model.get_image_features(pixel_values).last_hidden_state
    assert features.shape == (2, 4, 80)
    torch.testing.assert_close(features[1, 2], patches[1, 8:12].reshape(-1))


def test_a_feature_map_is_read_row_by_row_and_normalised(backbones):
    model = build(backbones, "convolutional")
    assert model.config.vision_feature_layer_norm
    pixel_values = torch.randn(1, 3, 64, 64)
    feature_map = model.model.vision_tower(pixel_values).last_hidden_state  # (1, 32, 2, 2)
    tokens = [
        torch.nn.functional.layer_norm(feature_map[0, :, row, column], (32,)) for row in (0, 1) for column in (0, 1)
    ]
    features = model.get_image_features(pixel_values).last_hidden_state
    torch.testing.assert_close(features[0, 0], torch.cat(tokens), rtol=1e-4, atol=1e-5)


def test_the_number_of_patches_must_divide_by_the_merge_size(backbones):
    with pytest.raises(ValueError, match=r"16 patch tokens.*`token_merge_size` 3"):
        build(backbones, "merged", config_kwargs={"token_merge_size": 3})


@pytest.mark.parametrize("token_id", [3, 1499, 1500, 99_999])
def test_the_placeholder_is_never_looked_up_wherever_its_id_lies(backbones, qformer_processor, pictures, token_id):
    model = build(backbones, "qformer", image_token_index=token_id)
    reference = build(backbones, "qformer", image_token_index=1500)
    inputs = inputs_of(qformer_processor, pictures)
    expected = reference(**inputs).logits
    inputs["input_ids"] = inputs["input_ids"].where(inputs["input_ids"] != 1500, token_id)
    with torch.no_grad():
        if token_id < 1500:
            model.get_input_embeddings().weight[token_id] = float("nan")
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_the_language_model_stays_bit_for_bit_what_it_was(backbones, qformer_model):
    original = AutoModelForCausalLM.from_pretrained(backbones["llama"])
    input_ids = torch.arange(40).reshape(2, 20)
    assert torch.equal(qformer_model(input_ids=input_ids).logits, original(input_ids=input_ids).logits)
    assert qformer_model.lm_head.weight.shape == original.lm_head.weight.shape


@pytest.mark.parametrize("attention", [None, "eager", "sdpa"])
def test_no_token_sees_a_later_one(backbones, recipe, attention):
    model = build(backbones, recipe, attn_implementation=attention)
    assert model.model.language_model.config._attn_implementation == (attention or "sdpa")
    input_ids = torch.arange(3, 15)[None]
    changed = input_ids.clone()
    changed[0, -1] = 20
    before = model(input_ids=input_ids).logits
    after = model(input_ids=changed).logits
    torch.testing.assert_close(after[:, :-1], before[:, :-1])
    assert not torch.allclose(after[:, -1], before[:, -1])


def test_images_may_come_as_pixels_features_or_encoder_outputs(model, processor, pictures):
    inputs = inputs_of(processor, pictures)
    expected = model(**inputs).logits
    pixel_values = inputs.pop("pixel_values")
    encoded = model.get_image_features(pixel_values)
    torch.testing.assert_close(model(**inputs, image_features=encoded.last_hidden_state).logits, expected)
    torch.testing.assert_close(model(**inputs, mm_encoder_outputs={"image": encoded}).logits, expected)
    with pytest.raises(ValueError, match="as pixel_values and as image_features"):
        model(**inputs, pixel_values=pixel_values, image_features=encoded.last_hidden_state)


def test_images_and_placeholders_that_do_not_match_are_refused(model, processor, pictures):
    inputs = inputs_of(processor, pictures)
    count = model.config.image_seq_length
    with pytest.raises(ValueError, match=rf"{count} image placeholders .* no images were given"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match=rf"has {count} image placeholders .* 2 images .* Expected {2 * count}"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1))


def test_a_batch_gives_what_its_rows_give(model, processor, pictures):
    texts = ["What is it?", "Tell me a longer story about the cat in the picture."]
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        batch = inputs_of(processor, pictures, texts)
        logits = model(**batch).logits
        for row, (text, picture) in enumerate(zip(texts, pictures, strict=False)):
            single = inputs_of(processor, [picture], [text])
            kept = batch["attention_mask"][row].bool()
            torch.testing.assert_close(logits[row][kept], model(**single).logits[0], rtol=1e-4, atol=1e-4)


def test_only_the_projection_trains_when_the_backbones_are_frozen(model, processor, pictures):
    model.freeze_backbones()
    model.train()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == ["model.multi_modal_projector.weight", "model.multi_modal_projector.bias"]
    frozen = [model.model.vision_tower, model.model.qformer, model.model.language_model]
    assert not any(module.training for part in frozen if part is not None for module in part.modules())
    assert model.training
    before = copy.deepcopy(model.state_dict())
    inputs = inputs_of(processor, pictures)
    features = model.get_image_features(inputs["pixel_values"])
    assert not features.last_hidden_state.requires_grad
    assert features.last_hidden_state.grad_fn is None
    assert features.pooler_output.requires_grad
    labels = inputs["input_ids"].where(inputs["input_ids"] != model.config.image_token_id, -100)
    model(**inputs, labels=labels).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == trainable


def test_a_part_that_is_thawed_again_trains(qformer_model):
    qformer_model.freeze_backbones()
    qformer_model.model.qformer.requires_grad_(True)
    qformer_model.train()
    assert qformer_model.model.qformer.training
    assert not qformer_model.model.vision_tower.training
    assert qformer_model.get_image_features(torch.randn(1, 3, 28, 28)).last_hidden_state.requires_grad


def test_the_projection_is_float32_over_bfloat16_backbones(backbones, recipe, tmp_path):
    model = build(backbones, recipe, dtype=torch.bfloat16)
    for directory, kwargs in (("full", {}), ("projection", {"projection_only": True})):
        model.save_pretrained(tmp_path / directory, **kwargs)
        for loaded in (model, MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / directory)):
            loaded.freeze_backbones()
            assert loaded.model.multi_modal_projector.weight.dtype == torch.float32
            assert loaded.lm_head.weight.dtype == torch.bfloat16
            assert loaded.model.vision_tower.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "text_config",
    [
        GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2),
        OPTConfig(
            vocab_size=64,
            hidden_size=16,
            ffn_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=8,
        ),
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2),
    ],
    ids=lambda config: config.model_type,
)
def test_any_decoder_and_any_encoder_will_do(text_config, tmp_path):
    vision = ConvNextConfig(num_stages=2, hidden_sizes=[8, 12], depths=[1, 1], image_size=32)
    config = MiniGPT4Config(
        vision_config=vision,
        qformer_config=None,
        text_config=text_config,
        vision_feature_size=12,
        vision_feature_layer_norm=True,
    )
    model = MiniGPT4ForConditionalGeneration(config).eval()
    input_ids = torch.tensor([[1, *[config.image_token_id] * 4, 5, 6]])
    pixel_values = torch.randn(1, 3, 32, 32)
    logits = model(input_ids=input_ids, pixel_values=pixel_values).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=input_ids, pixel_values=pixel_values).logits, logits)
    tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert tied == text_config.tie_word_embeddings


def test_an_encoder_without_a_known_width_is_named():
    with pytest.raises(ValueError, match=r"`vision_feature_size` is None and the `convnext`"):
        MiniGPT4Model(MiniGPT4Config(vision_config=ConvNextConfig(), qformer_config=None, text_config=GPT2Config()))


def test_every_recipe_is_tested():
    assert {style for *_, style in RECIPES.values()} == {"vicuna-v0", "llama-2", "native"}
