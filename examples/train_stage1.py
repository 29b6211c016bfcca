"""Stage 1: trains the projection of a MiniGPT-4 on image-caption pairs, and nothing else.

```shell
python examples/train_stage1.py --config examples/configs/stage1_tiny.yaml
```

Every argument may stand in the YAML file or on the command line, where it wins. `--resume_from_checkpoint true` goes
on from the last checkpoint in `output_dir`. The result is a projection-only checkpoint in `output_dir`.
"""

import json
import sys
from dataclasses import dataclass, field

import torch
from projection_training import ProjectionConfig, ProjectionTrainer, as_dtype, describe_parameters
from trl import TrlParser

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from processing import PROMPT_STYLES, build_processor, configure_generation, stage1_example
from processing.caption_dataset import as_examples, load_captions, mix_sources


@dataclass
class Stage1Arguments:
    """The parts of the model and the data."""

    vision_tower: str = field(metadata={"help": "Vision encoder: a repository, a folder or cache:NAME."})
    language_model: str = field(metadata={"help": "Language model: a repository, a folder or cache:NAME."})
    dataset: str = field(metadata={"help": "Data set with the columns image and caption: a folder or a repository."})
    qformer: str | None = field(default=None, metadata={"help": "BLIP-2 or MiniGPT-4 to take the Q-Former from."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the data set to train on."})
    source_weights: dict | str | None = field(
        default=None,
        metadata={
            "help": 'Weights to mix the rows by, by their column source: {"photographs": 1, ...}. Default: as is.'
        },
    )
    image_size: int | None = field(default=None, metadata={"help": "Side of the images. Default: the encoder's."})
    image_mean: list[float] | None = field(default=None, metadata={"help": "Default: CLIP's."})
    image_std: list[float] | None = field(default=None, metadata={"help": "Default: CLIP's."})
    prompt_style: str = field(default="native", metadata={"help": f"One of {', '.join(PROMPT_STYLES)}."})
    token_merge_size: int = field(default=4, metadata={"help": "Patch tokens in a visual token, without Q-Former."})
    dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the frozen parts."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of the language model."})

    def __post_init__(self) -> None:
        if isinstance(self.source_weights, str):
            try:
                self.source_weights = json.loads(self.source_weights)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"Got the source weights {self.source_weights!r}. Expected JSON, such as "
                    '\'{"photographs": 1, "drawings": 2}\'.'
                ) from error


def build_model(arguments: Stage1Arguments) -> MiniGPT4ForConditionalGeneration:
    """A model with a fresh projection, frozen but for that."""
    model = MiniGPT4ForConditionalGeneration.from_backbones(
        arguments.vision_tower,
        arguments.language_model,
        arguments.qformer,
        image_size=arguments.image_size,
        config_kwargs={"token_merge_size": arguments.token_merge_size},
        dtype=as_dtype(arguments.dtype),
        attn_implementation=arguments.attn_implementation,
    )
    model.freeze_backbones()
    return model


def train(arguments: Stage1Arguments, training_args: ProjectionConfig) -> None:
    """Trains and saves."""
    torch.manual_seed(training_args.seed)  # the fresh projection is drawn
    model = build_model(arguments)
    image_kwargs = {"image_mean": arguments.image_mean, "image_std": arguments.image_std}
    processor = build_processor(
        model.backbone_source("language_model"),
        model.config.image_seq_length,
        model.config.vision_config.image_size,
        arguments.prompt_style,
        **{name: value for name, value in image_kwargs.items() if value is not None},
    )
    configure_generation(model, processor)
    dataset = load_captions(arguments.dataset, arguments.dataset_split)
    if arguments.source_weights is not None:
        dataset = mix_sources(dataset, arguments.source_weights, training_args.seed)
    trainer = ProjectionTrainer(
        model,
        args=training_args,
        train_dataset=as_examples(dataset, stage1_example, processor),
        processing_class=processor,
    )
    print(f"{describe_parameters(model)}. Examples: {len(dataset):,}.")
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_final()
    print(f"The trained checkpoint is in {training_args.output_dir}.")


def main() -> None:
    parser = TrlParser((Stage1Arguments, ProjectionConfig), description=__doc__)
    try:
        train(*parser.parse_args_and_config())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
