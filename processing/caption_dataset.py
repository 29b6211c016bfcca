"""Folders of image-caption pairs as training data."""

import os
from collections.abc import Callable
from typing import Any

import datasets

from .processing_minigpt4 import MiniGPT4Processor


def load_captions(path: str | os.PathLike, split: str = "train") -> datasets.Dataset:
    """Opens image-caption pairs: a folder written by `save_to_disk`, or whatever `datasets.load_dataset` opens.

    Args:
        path (`str` or `os.PathLike`): Folder or repository.
        split (`str`, *optional*, defaults to `"train"`): Which part of it.

    Returns:
        `datasets.Dataset`: Rows with the columns `image` and `caption`, and others as they are.

    Raises:
        `ValueError`: If there is nothing at `path`, no such split, or a column is missing.
    """
    try:
        saved = os.path.isfile(os.path.join(path, "dataset_dict.json")) or os.path.isfile(
            os.path.join(path, "state.json")
        )
        loaded = datasets.load_from_disk(os.fspath(path)) if saved else datasets.load_dataset(os.fspath(path))
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"There is no data set at {path}: {error} Expected a folder that `Dataset.save_to_disk` wrote, or what "
            "`datasets.load_dataset` takes."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"{path} has no split {split!r}. Expected one of {', '.join(loaded)}.")
        loaded = loaded[split]
    if missing := {"image", "caption"} - set(loaded.column_names):
        raise ValueError(
            f"{path} has the columns {', '.join(loaded.column_names)}. Expected `image` and `caption`, and found no "
            f"{' and no '.join(sorted(missing))}."
        )
    return loaded


def mix_sources(dataset: datasets.Dataset, weights: dict[str, float], seed: int) -> datasets.Dataset:
    """Draws rows so that each source has its share, until every row of every source was drawn.

    Args:
        dataset (`datasets.Dataset`): Rows with a column `source`.
        weights (`dict[str, float]`): Weight of each source; one that is not named is left out.
        seed (`int`): Of the draw.

    Returns:
        `datasets.Dataset`: Rows of the sources, some of them several times.

    Raises:
        `ValueError`: If a source has no rows, or the weights do not add up to more than 0.
    """
    indices: dict[str, list[int]] = {name: [] for name in weights}
    for index, source in enumerate(dataset["source"]):
        if source in indices:
            indices[source].append(index)
    if empty := [name for name, rows in indices.items() if not rows]:
        raise ValueError(f"No row has the source {empty}. Expected some of {sorted(set(dataset['source']))}.")
    total = sum(weights.values())
    if total <= 0 or min(weights.values()) <= 0:
        raise ValueError(f"Got the weights {weights}. Expected positive numbers.")
    return datasets.interleave_datasets(
        [dataset.select(rows) for rows in indices.values()],
        probabilities=[weights[name] / total for name in indices],
        seed=seed,
        stopping_strategy="all_exhausted",
    )


def as_examples(
    dataset: datasets.Dataset,
    example: Callable[[Any, str, MiniGPT4Processor], dict[str, Any]],
    processor: MiniGPT4Processor,
) -> datasets.Dataset:
    """Makes training examples of rows when they are read.

    Args:
        dataset (`datasets.Dataset`): Rows with the columns `image` and `caption`.
        example (`Callable`): [`stage1_example`], or a function of the same form.
        processor ([`MiniGPT4Processor`]): Passed to it.

    Returns:
        `datasets.Dataset`: The same rows, read as TRL's prompt-completion records.
    """

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        examples = [
            example(image, caption, processor) for image, caption in zip(rows["image"], rows["caption"], strict=True)
        ]
        return {name: [one[name] for one in examples] for name in examples[0]}

    return dataset.with_transform(transform)
