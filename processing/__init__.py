"""Processing for MiniGPT-4: pictures and text to model inputs, prompts, and training examples."""

from .image_loading_minigpt4 import load_rgb_image
from .processing_minigpt4 import MiniGPT4Processor
from .prompt_styles import PROMPT_STYLES, build_processor, configure_generation
from .stage_examples import stage1_example, stage2_example, stage2_instructions


__all__ = [
    "PROMPT_STYLES",
    "MiniGPT4Processor",
    "build_processor",
    "configure_generation",
    "load_rgb_image",
    "stage1_example",
    "stage2_example",
    "stage2_instructions",
]
