"""When a MiniGPT-4 stops generating."""

import torch
from transformers import StoppingCriteria


class StopSequenceCriteria(StoppingCriteria):
    """Stops a row once the generated part of it ends with one of some sequences of token ids.

    `stop_strings` needs the tokenizer, and `eos_token_id` knows single tokens only; the `###` of Vicuna's template may
    be written in two.

    Args:
        sequences (`list[list[int]]`):
            Sequences of token ids.
    """

    def __init__(self, sequences: list[list[int]]):
        self.sequences = [torch.tensor(sequence) for sequence in sequences]
        self.prompt_length: int | None = None

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor | None, **kwargs: object
    ) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Prompt and generated tokens.

        Returns:
            `torch.BoolTensor` of shape `(batch_size,)`: Which rows are done.
        """
        if self.prompt_length is None:  # `generate` asks first when it has one token
            self.prompt_length = input_ids.shape[1] - 1
        generated = input_ids[:, self.prompt_length :]
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for sequence in self.sequences:
            if generated.shape[1] >= len(sequence):
                ending = generated[:, -len(sequence) :]
                done |= (ending == sequence.to(input_ids.device)).all(dim=-1)
        return done
