"""transformers' common model tests on the classes of this package."""

import unittest

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2VisionConfig, LlamaConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING,
    MODEL_MAPPING_NAMES,
)

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Model
from tests.slow import transformers_tests
from tests.slow.skips import SKIPPED


common = transformers_tests.load("test_modeling_common")
configurations = transformers_tests.load("test_configuration_common")


@pytest.fixture(autouse=True)
def in_transformers_lists(monkeypatch):
    """The common tests look classes up in transformers' lists, as one of its own models would be found."""
    monkeypatch.setitem(MODEL_MAPPING_NAMES, "minigpt4", "MiniGPT4Model")
    monkeypatch.setitem(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "minigpt4", "MiniGPT4ForConditionalGeneration")
    monkeypatch.setitem(MODEL_MAPPING._extra_content, MiniGPT4Config, MiniGPT4Model)


class ModelTester:
    """Tiny configurations and inputs, in the form that transformers' tests ask for."""

    batch_size = 7  # as many as the attention tests take, which would fill up with random ids otherwise
    image_token_id = 1
    is_training = True
    num_hidden_layers = 2
    num_attention_heads = 2
    hidden_size = 32
    num_channels = 3
    image_size = 16

    def __init__(self, parent: unittest.TestCase, with_qformer: bool):
        self.parent = parent
        self.with_qformer = with_qformer
        self.text_only = False
        self.num_visual_tokens = 4
        self.seq_length = self.num_visual_tokens + 7
        self.text_config = {
            "model_type": "llama",
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 98,
            "bos_token_id": 97,
            "eos_token_id": 96,
        }
        self.vision_config = {
            "model_type": "blip_2_vision_model",
            "hidden_size": 24,
            "intermediate_size": 33,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": self.image_size,
            "patch_size": 4,
        }
        self.qformer_config = {
            "hidden_size": 20,
            "vocab_size": 99,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 35,
            "encoder_hidden_size": 24,
            "max_position_embeddings": 64,
        }

    def get_config(self) -> MiniGPT4Config:
        return MiniGPT4Config(
            vision_config=Blip2VisionConfig(**self.vision_config),
            qformer_config=Blip2QFormerConfig(**self.qformer_config) if self.with_qformer else None,
            text_config=LlamaConfig(**self.text_config),
            num_query_tokens=self.num_visual_tokens,
            image_token_index=self.image_token_id,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[MiniGPT4Config, dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(2, 95, (self.batch_size, self.seq_length), generator=generator)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if self.text_only:
            return self.get_config(), inputs
        input_ids[:, : self.num_visual_tokens] = self.image_token_id
        shape = (self.batch_size, self.num_channels, self.image_size, self.image_size)
        return self.get_config(), inputs | {"pixel_values": torch.rand(shape, generator=generator)}


class CommonTests(common.ModelTesterMixin):
    all_model_classes = (MiniGPT4Model, MiniGPT4ForConditionalGeneration)
    additional_model_inputs = ("pixel_values",)
    skip_test_image_features_output_shape = True  # as for BLIP-2: the Q-Former's width, or that of merged patches
    _is_composite = True
    with_qformer = True

    def setUp(self) -> None:
        if reason := SKIPPED.get(self._testMethodName):
            self.skipTest(reason)
        self.model_tester = ModelTester(self, self.with_qformer)
        # Random text must not contain the placeholder, and embeddings of text have no place for pictures.
        if "rope_scaling" in self._testMethodName:
            self.model_tester.image_token_id = self.model_tester.text_config["vocab_size"]
        self.model_tester.text_only = self._testMethodName.startswith("test_inputs_embeds")
        self.config_tester = configurations.ConfigTester(self, config_class=MiniGPT4Config, has_text_modality=False)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class MiniGPT4ModelTest(CommonTests, unittest.TestCase):
    """With a Q-Former."""


class MiniGPT4WithoutQFormerModelTest(CommonTests, unittest.TestCase):
    """With merged patch tokens."""

    with_qformer = False
