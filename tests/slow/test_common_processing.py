"""transformers' common processor tests on the processor of this package."""

import unittest
from typing import Any

from transformers import AutoTokenizer, BlipImageProcessorPil

from processing import MiniGPT4Processor, build_processor
from tests.recipes import ORIGINAL
from tests.slow import transformers_tests
from tests.slow.skips import SKIPPED


common = transformers_tests.load("test_processing_common")


class MiniGPT4ProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = MiniGPT4Processor

    def setUp(self) -> None:
        if reason := SKIPPED.get(self._testMethodName):
            self.skipTest(reason)

    @classmethod
    def _setup_from_components(cls) -> MiniGPT4Processor:
        tokenizer = AutoTokenizer.from_pretrained(ORIGINAL / "llm")
        processor = build_processor(tokenizer, num_image_tokens=4, image_size=24, prompt_style="llama-2")
        processor.chat_template = processor.chat_template["default"]  # the tests know one template
        return processor

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        processor = MiniGPT4ProcessorTest._setup_from_components()
        names = ("num_image_tokens", "end_symbol", "chat_template")
        return {name: getattr(processor, name) for name in names}

    @classmethod
    def _setup_image_processor(cls) -> Any:
        return BlipImageProcessorPil(size={"height": 24, "width": 24})
