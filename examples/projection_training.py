"""What training the projection changes in TRL's `SFTTrainer`: defaults, checkpoints, and what is logged."""

import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.trainer import TRAINING_ARGS_NAME
from trl import SFTConfig, SFTTrainer


@dataclass
class ProjectionConfig(SFTConfig):
    """`SFTConfig` with the defaults that a frozen model with one trained layer wants."""

    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute the decoder's activations: less memory, more time."}
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
        metadata={"help": "Dtype of the final projection: bfloat16, float16 or float32, as trained, the default."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.final_dtype = as_dtype(self.save_dtype or "float32")


class ProjectionTrainer(SFTTrainer):
    """`SFTTrainer` whose checkpoints hold the projection alone.

    Raises:
        `ValueError`: If anything but the projection would train.
    """

    def __init__(self, model: PreTrainedModel, **kwargs: Any):
        check_only_projection_trains(model)
        # Keeps `Trainer` silent about the frozen weights when it resumes.
        model._keys_to_ignore_on_save = [name for name in model.state_dict() if "multi_modal_projector." not in name]
        self._is_final = False
        self._logged_step, self._logged_at = 0, time.perf_counter()
        super().__init__(model=model, **kwargs)
        check_only_projection_trains(self.model)
        self.add_callback(_Stopwatch(self))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """On a CPU, scores only positions at which a row has a label: TRL's fused head scores all, in float32."""
        if self.args.device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        scored = (labels[:, 1:] != -100).any(dim=0).nonzero().squeeze(-1)
        inputs["use_cache"] = False
        outputs = model(**inputs, logits_to_keep=scored)
        targets = labels[:, scored + 1].flatten()
        loss = fixed_cross_entropy(outputs.logits.flatten(0, 1).float(), targets, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        model = self.accelerator.unwrap_model(self.model)
        weights = model.state_dict() if state_dict is None else state_dict
        weights = {name: weight for name, weight in weights.items() if "multi_modal_projector." in name}
        if self._is_final:
            weights = {name: weight.to(self.args.final_dtype) for name, weight in weights.items()}
        model.save_pretrained(output_dir, state_dict=weights, projection_only=True)
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def save_final(self) -> None:
        """Writes the trained checkpoint, projection-only, to `output_dir`, in `save_dtype`."""
        self._is_final = True
        self.save_model()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            step, now = self.state.global_step, time.perf_counter()
            batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            logs["examples_per_second"] = round((step - self._logged_step) * batch_size / (now - self._logged_at), 2)
            self._logged_step, self._logged_at = step, now
        super().log(logs, *args, **kwargs)


class _Stopwatch(TrainerCallback):
    """Starts the count of examples per second where training starts, which is not step 0 when it resumes."""

    def __init__(self, trainer: ProjectionTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._logged_step, self.trainer._logged_at = state.global_step, time.perf_counter()


def as_dtype(name: str) -> torch.dtype:
    """
    Raises:
        `ValueError`: If it is no dtype that weights may have.
    """
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in dtypes:
        raise ValueError(f"Got the dtype {name!r}. Expected one of {', '.join(dtypes)}.")
    return dtypes[name]


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
