import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Model
from modeling_minigpt4.backbones_minigpt4 import cache_directory
from tests.recipes import build


def assert_same_weights(one, other):
    expected = one.state_dict()
    received = other.state_dict()
    assert received.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(expected[name], received[name])]


@pytest.mark.parametrize("projection_only", [False, True])
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText])
def test_saving_and_loading_changes_no_bit(model, tmp_path, auto_class, projection_only):
    model.save_pretrained(tmp_path, projection_only=projection_only)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is MiniGPT4ForConditionalGeneration
    assert_same_weights(model, loaded)
    assert not loaded.training
    assert loaded.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()


def test_a_projection_only_checkpoint_holds_the_projection_and_names_the_rest(model, backbones, tmp_path):
    model.save_pretrained(tmp_path, projection_only=True)
    weights = load_file(tmp_path / "model.safetensors")
    assert sorted(weights) == ["model.multi_modal_projector.bias", "model.multi_modal_projector.weight"]
    named = json.loads((tmp_path / "config.json").read_text())["backbones"]
    assert {entry["source"] for entry in named.values()} <= set(backbones.values())


def test_a_full_checkpoint_depends_on_nothing_else(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["backbones"] is None
    assert model.config.backbones is not None, "saving changes nothing in memory"
    with pytest.raises(ValueError, match="is a full checkpoint"):
        AutoModel.from_pretrained(tmp_path, backbones={"language_model": "elsewhere"})


def test_the_headless_model_opens_both_kinds(model, tmp_path):
    for projection_only in (False, True):
        model.save_pretrained(tmp_path / str(projection_only), projection_only=projection_only)
        headless = MiniGPT4Model.from_pretrained(tmp_path / str(projection_only))
        assert_same_weights(model.model, headless)
    model.model.save_pretrained(tmp_path / "headless", projection_only=True)
    assert_same_weights(model.model, MiniGPT4Model.from_pretrained(tmp_path / "headless"))
    assert_same_weights(model, MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "headless"))


def test_a_part_may_be_taken_from_elsewhere(backbones, tmp_path):
    model = build(backbones, "qformer")
    model.save_pretrained(tmp_path / "checkpoint", projection_only=True)
    moved = shutil.copytree(backbones["llama"], tmp_path / "moved")
    loaded = AutoModel.from_pretrained(tmp_path / "checkpoint", backbones={"language_model": str(moved)})
    assert loaded.config.backbones["language_model"] == {"source": str(moved)}
    assert_same_weights(model, loaded)
    with pytest.raises(ValueError, match=r"\['decoder'\]. Expected some of \['language_model', 'qformer'"):
        AutoModel.from_pretrained(tmp_path / "checkpoint", backbones={"decoder": str(moved)})


def test_each_backbone_is_read_once(backbones, tmp_path, monkeypatch):
    build(backbones, "qformer").save_pretrained(tmp_path, projection_only=True)
    read = []
    from_pretrained = AutoModel.from_pretrained.__func__
    import modeling_minigpt4.backbones_minigpt4 as module

    load = module._load_part
    monkeypatch.setattr(module, "_load_part", lambda *args: read.append(args[1].part) or load(*args))
    AutoModel.from_pretrained(tmp_path)
    assert sorted(read) == ["language_model", "qformer", "vision_tower"]
    assert AutoModel.from_pretrained.__func__ is from_pretrained


def test_only_the_shards_that_hold_a_part_are_opened(backbones, tmp_path):
    from transformers import Blip2ForConditionalGeneration

    sharded = tmp_path / "blip2"
    Blip2ForConditionalGeneration.from_pretrained(backbones["blip2"]).save_pretrained(sharded, max_shard_size="20KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = ("vision_model.", "qformer.", "query_tokens")
    needed = {shard for key, shard in index.items() if key.startswith(wanted)}
    spare = set(index.values()) - needed
    assert spare, "some shards hold the language model only"
    for shard in spare:
        (sharded / shard).unlink()
    whole = build(backbones, "qformer")
    parts = MiniGPT4ForConditionalGeneration.from_backbones(sharded, backbones["llama"], sharded)
    assert_same_weights(whole.model.vision_tower, parts.model.vision_tower)
    assert_same_weights(whole.model.qformer, parts.model.qformer)
    assert torch.equal(whole.model.query_tokens, parts.model.query_tokens)


def test_another_minigpt4_can_lend_its_vision_side(backbones, tmp_path):
    lender = build(backbones, "qformer")
    lender.save_pretrained(tmp_path)
    model = MiniGPT4ForConditionalGeneration.from_backbones(tmp_path, backbones["gpt2"], tmp_path)
    pixel_values = torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(
        model.get_image_features(pixel_values).last_hidden_state,
        lender.get_image_features(pixel_values).last_hidden_state,
    )


def test_a_clip_encoder_is_taken_as_it_is(backbones):
    model = MiniGPT4ForConditionalGeneration.from_backbones(backbones["clip"], backbones["llama"])
    assert model.config.image_seq_length == 4, "16 patches without the class token, merged by four"


def test_a_missing_cache_folder_is_named_with_the_command_that_builds_it(backbones, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT4_CACHE", str(tmp_path / "cache"))
    shutil.copytree(backbones["llama"], tmp_path / "cache" / "decoder")
    model = MiniGPT4ForConditionalGeneration.from_backbones(backbones["vit"], "cache:decoder")
    model.save_pretrained(tmp_path / "checkpoint", projection_only=True)
    assert_same_weights(model, AutoModel.from_pretrained(tmp_path / "checkpoint"))
    decoder = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["text_config"]
    assert decoder["_name_or_path"] == "cache:decoder", "and no path of this machine"
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(OSError, match=r"`cache:decoder`.*python examples/tiny/build_backbones.py") as error:
        AutoModel.from_pretrained(tmp_path / "checkpoint")
    assert str(cache_directory() / "decoder") in str(error.value)


def test_a_missing_folder_is_named(backbones, tmp_path):
    with pytest.raises(OSError, match=re.escape(f"`vision_tower` cannot be opened from `{tmp_path}/nothing`")):
        MiniGPT4ForConditionalGeneration.from_backbones(f"{tmp_path}/nothing", backbones["llama"])


def test_a_backbone_with_missing_weights_is_refused(backbones, tmp_path):
    from safetensors.torch import save_file

    folder = shutil.copytree(backbones["llama"], tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    removed = next(name for name in weights if "mlp" in name)
    del weights[removed]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=re.escape(f"lacks 1 weights of the `language_model` (LlamaForCausalLM): {removed}")
    ):
        MiniGPT4ForConditionalGeneration.from_backbones(backbones["vit"], folder)


def test_sizes_that_do_not_fit_are_both_named(backbones, tmp_path):
    with pytest.raises(ValueError, match=r"features of size 20, but the Q-Former reads features of size 32"):
        MiniGPT4ForConditionalGeneration.from_backbones(backbones["vit"], backbones["llama"], backbones["blip2"])
    build(backbones, "qformer").save_pretrained(tmp_path, projection_only=True)
    with pytest.raises(ValueError, match=r"shapes .*\(48, 24\).*need .*\(40, 24\)"):
        AutoModel.from_pretrained(tmp_path, backbones={"language_model": backbones["gpt2"]})


def test_a_qformer_without_query_tokens_is_refused(backbones):
    with pytest.raises(ValueError, match="Expected a BLIP-2 or a MiniGPT-4 with a Q-Former"):
        MiniGPT4ForConditionalGeneration.from_backbones(backbones["blip2"], backbones["llama"], backbones["vit"])


def test_what_cannot_be_opened_again_is_not_saved(backbones, tmp_path):
    model = build(backbones, "merged")
    model.config.backbones = {"vision_tower": {"source": backbones["vit"]}}
    with pytest.raises(ValueError, match="does not say where language_model come from"):
        model.save_pretrained(tmp_path, projection_only=True)
    assert not list(Path(tmp_path).iterdir())


def test_the_processor_is_saved_beside_the_model(model, processor, pictures, tmp_path):
    model.save_pretrained(tmp_path, projection_only=True)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    prompt = processor.image_prompt()
    assert loaded.image_prompt() == prompt
    for key, value in processor(images=pictures[0], text=prompt, return_tensors="pt").items():
        assert torch.equal(loaded(images=pictures[0], text=prompt, return_tensors="pt")[key], value)


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        ("eager", ("eager", "eager", "eager")),
        ("sdpa", ("sdpa", "sdpa", "sdpa")),
        ({"text_config": "eager", "qformer_config": "eager"}, ("sdpa", "eager", "eager")),
    ],
    ids=str,
)
def test_attention_implementations_reach_the_parts(backbones, tmp_path, attention, expected):
    build(backbones, "qformer").save_pretrained(tmp_path, projection_only=True)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation=attention)
    parts = (model.model.vision_tower, model.model.qformer, model.model.language_model)
    assert tuple(part.config._attn_implementation for part in parts) == expected
    assert model.config.text_config is model.model.language_model.config


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_holds_for_the_backbones(backbones, tmp_path, name):
    build(backbones, "qformer").save_pretrained(tmp_path, projection_only=True)
    model = AutoModel.from_pretrained(tmp_path, low_cpu_mem_usage=True, **{name: torch.bfloat16})
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "projector" not in name} == {torch.bfloat16}
    assert dtypes["model.multi_modal_projector.weight"] == torch.float32


def test_an_argument_that_has_no_meaning_is_refused(backbones, tmp_path):
    build(backbones, "merged").save_pretrained(tmp_path, projection_only=True)
    with pytest.raises(ValueError, match=r"Frozen parts cannot be opened with \['tp_plan'\]"):
        AutoModel.from_pretrained(tmp_path, tp_plan="auto")


def test_loading_info_is_empty(backbones, tmp_path):
    build(backbones, "merged").save_pretrained(tmp_path, projection_only=True)
    _, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())


def test_dtype_auto_is_the_saved_dtype(backbones, tmp_path):
    model = build(backbones, "qformer", dtype=torch.bfloat16)
    for name, projection_only in (("full", False), ("projection", True)):
        model.save_pretrained(tmp_path / name, projection_only=projection_only)
        for opener in (AutoModel, MiniGPT4ForConditionalGeneration):
            assert opener.from_pretrained(tmp_path / name, dtype="auto").lm_head.weight.dtype == torch.bfloat16


def test_generation_settings_come_from_the_subfolder_of_the_weights(backbones, tmp_path):
    model = build(backbones, "qformer")
    model.save_pretrained(tmp_path, projection_only=True)
    model.generation_config.eos_token_id = [2, 351]
    model.save_pretrained(tmp_path / "inside", projection_only=True)
    loaded = AutoModel.from_pretrained(tmp_path, subfolder="inside")
    assert loaded.generation_config.eos_token_id == [2, 351]


@pytest.mark.parametrize(
    ("parts", "kwargs", "message"),
    [
        (("vit", "blip2", None), {}, "is a `blip-2`. Expected a decoder of its own"),
        (("gpt2", "llama", None), {"image_size": 32}, "is a GPT2Model. Expected a vision encoder"),
        (("vit", "llama", None), {"image_size": 64}, "Is the image size the one that it was trained with"),
        (("resnet", "llama", None), {}, "has no `image_size`. Pass the side of the images"),
        (("vit", "llama", None), {"revision": "main"}, r"Got \['revision'\] for all parts at once"),
        (("vit", "llama", None), {"tp_plan": "auto"}, r"Frozen parts cannot be opened with \['tp_plan'\]"),
    ],
    ids=str,
)
def test_parts_that_do_not_go_together_are_refused(backbones, parts, kwargs, message):
    vision, text, qformer = (backbones[part] if part else None for part in parts)
    with pytest.raises(ValueError, match=message):
        MiniGPT4ForConditionalGeneration.from_backbones(vision, text, qformer, **kwargs)


def test_settings_of_the_configuration_can_be_given(backbones):
    model = build(backbones, "merged", config_kwargs={"token_merge_size": 2, "initializer_range": 0.5})
    assert (model.config.image_seq_length, model.config.initializer_range) == (8, 0.5)
