"""Distribution `minigpt4-transformers`: the packages `modeling_minigpt4` and `processing`."""

from pathlib import Path

from setuptools import setup


TRAIN = ["accelerate>=1.10", "datasets>=4.0", "peft>=0.17", "trl>=1.16,<2"]
CURATE = ["datasets>=4.0"]
SERVE = ["vllm>=0.32,<0.33"]
DEV = ["build>=1.2", "gguf>=0.17", "mypy>=2.0", "pytest>=8.0", "ruff>=0.17"]

setup(
    name="minigpt4-transformers",
    version="0.1.0",
    description="MiniGPT-4 as an ordinary transformers model",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    packages=["modeling_minigpt4", "processing"],
    package_data={"modeling_minigpt4": ["py.typed"], "processing": ["py.typed", "*.txt", "chat_templates/*.jinja"]},
    python_requires=">=3.10",
    install_requires=[
        "transformers>=5.19,<6",
        "torch>=2.7",
        "safetensors>=0.6",
        "huggingface-hub>=1.31,<3",
        "pillow>=10.1",
        "numpy>=1.26",
        "jinja2>=3.1",
        "protobuf>=4.25",
        "sentencepiece>=0.2",
    ],
    extras_require={
        "train": TRAIN,
        "curate": CURATE,
        "serve": SERVE,
        "dev": [*DEV, *TRAIN, *CURATE],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
