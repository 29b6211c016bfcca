"""What training the projection changes in TRL's `SFTTrainer`: defaults, checkpoints, and what is logged."""

import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer


@dataclass
class ProjectionConfig(SFTConfig):
    """`SFTConfig` with the defaults that a frozen model with one trained layer wants."""

    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in backward. The frozen parts keep few of them."}
    )
    bf16: bool | None = field(
        default=False, metadata={"help": "Autocast. The backbones have their dtype, and the projection is float32."}
    )
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "All trained weights are used."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Examples are made when rows are read."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a sequence at most. Cutting may cut visual tokens."}
    )
    save_dtype: str | None = field(
        default=None,
        metadata={"help": "Dtype of the final projection, such as bfloat16. Defaults to float32, as trained."},
    )


class ProjectionTrainer(SFTTrainer):
    """`SFTTrainer` whose checkpoints hold the projection alone.

    Raises:
        `ValueError`: If anything but the projection would train.
    """

    def __init__(self, model: PreTrainedModel, **kwargs: Any):
        check_only_projection_trains(model)
        super().__init__(model=model, **kwargs)
        check_only_projection_trains(self.model)
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        # Keeps `Trainer` silent about them when it resumes.
        model._keys_to_ignore_on_save = [*frozen, "lm_head.weight", *dict(model.named_buffers())]
        self._logged = (0, time.perf_counter())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(output_dir, state_dict=state_dict, projection_only=True)
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            step, now = self.state.global_step, time.perf_counter()
            batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            logs["examples_per_second"] = round((step - self._logged[0]) * batch_size / (now - self._logged[1]), 2)
            self._logged = (step, now)
        super().log(logs, *args, **kwargs)

    def save_final(self) -> None:
        """Writes the trained checkpoint, projection-only, to `output_dir`."""
        model = self.accelerator.unwrap_model(self.model)
        weights = {name: weight for name, weight in model.state_dict().items() if "multi_modal_projector." in name}
        if self.args.save_dtype is not None:
            dtype = getattr(torch, self.args.save_dtype)
            weights = {name: weight.to(dtype) for name, weight in weights.items()}
        model.save_pretrained(self.args.output_dir, state_dict=weights, projection_only=True)
        self.processing_class.save_pretrained(self.args.output_dir)


def check_only_projection_trains(model: PreTrainedModel) -> None:
    """
    Raises:
        `ValueError`: If anything but the projection has gradients, or the projection has none.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    others = [name for name in trainable if "multi_modal_projector." not in name]
    if others or not trainable:
        raise ValueError(
            f"{len(others)} parameters beside the projection would train ({', '.join(others[:3]) or 'none'}), and "
            f"{len(trainable) - len(others)} of the projection. Expected the projection alone: call "
            "`model.freeze_backbones()`."
        )


def describe_parameters(model: PreTrainedModel) -> str:
    """How many parameters train, of how many."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trainable = sum(count for count, _ in counts), sum(count for count, trains in counts if trains)
    return f"Trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.2f} %)"
