from collections import Counter

import datasets
import pytest

from processing import build_processor, stage1_example
from processing.caption_dataset import as_examples, load_captions, mix_sources


@pytest.fixture
def rows(pictures):
    return datasets.Dataset.from_dict(
        {
            "image": [pictures[index % 3] for index in range(12)],
            "caption": [f"Picture {index}." for index in range(12)],
            "source": ["photographs"] * 2 + ["drawings"] * 10,
        }
    ).cast_column("image", datasets.Image())


def test_a_saved_folder_is_opened_by_split(rows, tmp_path):
    datasets.DatasetDict(train=rows, heldout=rows.select([0])).save_to_disk(tmp_path)
    assert len(load_captions(tmp_path)) == 12
    assert len(load_captions(tmp_path, "heldout")) == 1
    with pytest.raises(ValueError, match=r"no split 'test'. Expected one of train, heldout"):
        load_captions(tmp_path, "test")


def test_what_is_no_data_set_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="There is no data set at"):
        load_captions(tmp_path / "nothing")
    rows.remove_columns("caption").save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"Expected `image` and `caption`, and found no caption"):
        load_captions(tmp_path)


def test_sources_are_mixed_by_weight_until_all_was_seen():
    sources = ["photographs"] * 20 + ["drawings"] * 400
    rows = datasets.Dataset.from_dict({"caption": [str(row) for row in range(420)], "source": sources})
    mixed = mix_sources(rows, {"photographs": 1, "drawings": 1}, seed=0)
    assert set(mixed["caption"]) == set(rows["caption"])
    counts = Counter(mixed["source"])
    assert 0.8 < counts["photographs"] / counts["drawings"] < 1.25, "half of each, though one has 20 times the rows"
    assert mix_sources(rows, {"photographs": 1, "drawings": 1}, seed=0)["caption"] == mixed["caption"]
    assert set(mix_sources(rows, {"drawings": 3}, seed=0)["source"]) == {"drawings"}


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"paintings": 1}, "No row has the source"), ({"drawings": 0.0}, "Expected positive numbers")],
)
def test_weights_that_do_not_fit_are_refused(rows, weights, message):
    with pytest.raises(ValueError, match=message):
        mix_sources(rows, weights, seed=0)


def test_examples_are_made_when_rows_are_read(rows, backbones):
    processor = build_processor(backbones["llama"], 5, 28, "vicuna-v0")
    example = as_examples(rows, stage1_example, processor)[3]
    assert (example["prompt"], example["completion"]) == ("<s><ImageHere>", "Picture 3.\n")
    assert example["images"][0].size == (50, 40)
