import pytest
from transformers import AutoConfig, Blip2QFormerConfig, Blip2VisionConfig, EfficientNetConfig, GPT2Config

from modeling_minigpt4 import MiniGPT4Config


def test_the_defaults_are_those_of_minigpt4_with_vicuna_7b():
    config = MiniGPT4Config()
    assert isinstance(config.vision_config, Blip2VisionConfig)
    assert (config.vision_config.num_hidden_layers, config.vision_config.image_size) == (39, 224)
    assert (config.qformer_config.num_hidden_layers, config.num_query_tokens) == (12, 32)
    assert (config.text_config.model_type, config.text_config.hidden_size) == ("llama", 4096)
    assert (config.projection_in_features, config.image_seq_length, config.image_token_id) == (768, 32, 32000)


def test_no_qformer_is_a_choice_that_survives_saving(tmp_path):
    config = MiniGPT4Config(qformer_config=None, text_config=GPT2Config())
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MiniGPT4Config
    assert loaded.qformer_config is None
    assert loaded.image_seq_length == 64, "256 patches, merged by four"
    assert loaded.projection_in_features == 4 * 1408
    assert loaded.to_diff_dict() | {"_name_or_path": ""} == config.to_diff_dict() | {"_name_or_path": ""}


def test_sub_configurations_may_be_dictionaries(tmp_path):
    config = MiniGPT4Config(
        vision_config={"model_type": "efficientnet", "hidden_dim": 16},
        qformer_config={"hidden_size": 24, "num_attention_heads": 2, "encoder_hidden_size": 16},
        text_config={"model_type": "gpt2", "n_embd": 40},
        vision_feature_size=16,
    )
    assert isinstance(config.vision_config, EfficientNetConfig)
    assert isinstance(config.qformer_config, Blip2QFormerConfig)
    assert config.get_text_config().n_embd == 40
    assert config.tie_word_embeddings, "GPT-2 ties its head"


def test_an_attention_implementation_reaches_the_parts():
    config = MiniGPT4Config()
    config._attn_implementation = {"text_config": "eager", "vision_config": "sdpa"}
    assert config.text_config._attn_implementation == "eager"
    assert config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("key", "value"), [("token_merge_size", "four"), ("num_query_tokens", None)])
def test_a_setting_of_the_wrong_type_is_refused(key, value):
    with pytest.raises(Exception, match=key):
        MiniGPT4Config(**{key: value})
