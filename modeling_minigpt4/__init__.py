"""MiniGPT-4 for transformers. Importing this package registers its classes with the Auto classes and the pipeline."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from processing.processing_minigpt4 import MiniGPT4Processor

from .configuration_minigpt4 import MiniGPT4Config
from .modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Model, MiniGPT4PreTrainedModel
from .pipeline_minigpt4 import MiniGPT4Pipeline, register_pipeline


AutoConfig.register(MiniGPT4Config.model_type, MiniGPT4Config)
for _auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(MiniGPT4Config, MiniGPT4ForConditionalGeneration)
AutoProcessor.register(MiniGPT4Config, MiniGPT4Processor)
register_pipeline()

# What is saved brings its code along, for `trust_remote_code=True`.
MiniGPT4Config.register_for_auto_class()
MiniGPT4ForConditionalGeneration.register_for_auto_class("AutoModel")
MiniGPT4Processor.register_for_auto_class()

__all__ = [
    "MiniGPT4Config",
    "MiniGPT4ForConditionalGeneration",
    "MiniGPT4Model",
    "MiniGPT4Pipeline",
    "MiniGPT4PreTrainedModel",
    "MiniGPT4Processor",
]
