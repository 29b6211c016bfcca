"""The tiny model's training data: captions, what is held out, views, and what ends up in the folder."""

import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "tiny"))

import prepare_data
from caption_rules import (
    CaptionOverrides,
    emoji_caption,
    is_caption,
    photograph_caption,
    photograph_kind,
    stamp_caption,
    with_article,
)
from picture_sources import Picture, emoji_pictures, photograph_pictures
from picture_views import VIEW_SIZE, cutout_views, on_white, photograph_views
from tuxpaint_stamps import (
    Stamp,
    choose_heldout,
    group_stamps,
    normalized_name,
    read_heldout,
    read_stamps,
    split_stamps,
)


TINY = Path(prepare_data.__file__).parent
NOTHING_BY_HAND = CaptionOverrides({}, {}, {}, frozenset(), frozenset())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("apple", "an apple"),
        ("pear", "a pear"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("hourglass", "an hourglass"),
        ("horse", "a horse"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("European castle", "a European castle"),
        ("X-ray", "an X-ray"),
    ],
)
def test_the_article_follows_the_sound(name: str, expected: str) -> None:
    assert with_article(name) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (stamp_caption("A happy lion!"), "A happy lion."),
        (stamp_caption("A wheelie bin! Give me your trash!"), "A wheelie bin."),
        (stamp_caption("A peacock (a male peafowl)."), "A peacock."),
        (stamp_caption("A \u201cFuji\u201d apple."), "A Fuji apple."),
        (emoji_caption("RED APPLE"), "A red apple."),
        (emoji_caption("OTTER"), "An otter."),
        (emoji_caption("JAPANESE CASTLE"), "A Japanese castle."),
        (photograph_caption("Irish_setter"), "An Irish setter."),
        (photograph_caption("goldfish"), "A goldfish."),
    ],
)
def test_captions_read_as_people_say_them(caption: str, expected: str) -> None:
    assert caption == expected
    assert is_caption(caption)


def test_photographs_are_called_by_an_everyday_name_too() -> None:
    assert photograph_kind("n02123045") == "cat"  # tabby
    assert photograph_kind("n01704323") is None  # triceratops
    tabby = Picture("photographs", "a", Path("a.jpg"), "A tabby.", plain_caption="A cat.")
    captions = [tabby.caption_of_view(view) for view in range(5)]
    assert captions == ["A tabby.", "A cat.", "A tabby.", "A cat.", "A cat."]
    assert Picture("photographs", "a", Path("a.jpg"), "A fox.").caption_of_view(1) == "A fox."


@pytest.mark.parametrize("text", ["no capital.", "No stop", "Two. Sentences.", "A.", "Really?"])
def test_what_is_not_one_sentence_is_no_caption(text: str) -> None:
    assert not is_caption(text)


def test_captions_written_by_hand_are_captions() -> None:
    overrides = CaptionOverrides.load()
    captions = [caption for part in (overrides.stamps, overrides.emoji) for caption in part.values() if caption]
    captions += [f"{phrase[0].upper()}{phrase[1:]}." for phrase in overrides.photographs.values()]
    assert [caption for caption in captions if not is_caption(caption)] == []


@pytest.mark.parametrize(
    "name",
    [
        "cat.png",
        "cat2.png",
        "cat-2.png",
        "Cat_01.png",
        "cat_cartoon.png",
        "cat_mirror.png",
        "cat_2_mirror.png",
        "cat_left.png",
        "cat-a.png",
        "cat_white.png",
        "blackcat.png",
    ],
)
def test_variants_of_a_thing_share_its_name(name: str) -> None:
    assert normalized_name(f"animals/cats/{name}") == "cat"


def test_names_that_only_look_like_variants_stay_apart() -> None:
    assert normalized_name("a/cheetah.png") != normalized_name("a/cheet.png")
    assert normalized_name("space/planets/3_earth.png") != normalized_name("space/planets/4_mars.png")


def stamps_of(*pairs: tuple[str, str]) -> list[Stamp]:
    return [Stamp(name, caption, mirrorable=True) for name, caption in pairs]


def test_groups_join_by_name_and_by_caption() -> None:
    stamps = stamps_of(
        ("a/cat.png", "A cat."), ("b/kitty.png", "A cat."), ("c/kitty2.png", "A kitten."), ("d/dog.png", "A dog.")
    )
    assert [[stamp.name for stamp in group] for group in group_stamps(stamps)] == [
        ["a/cat.png", "b/kitty.png", "c/kitty2.png"],
        ["d/dog.png"],
    ]


def test_held_out_stamps_are_chosen_by_whole_groups_and_by_seed() -> None:
    stamps = stamps_of(*((f"x/thing{'abcdefghij'[i // 3]}x{i % 3}.png", f"Thing {i}.") for i in range(30)))
    chosen = choose_heldout(stamps, minimum=10, seed=1)
    assert len(chosen) == 12
    assert set(Counter(normalized_name(name) for name in chosen).values()) == {3}
    assert chosen == choose_heldout(reversed(stamps), minimum=10, seed=1)
    assert chosen != choose_heldout(stamps, minimum=10, seed=2)


def test_no_variant_of_a_held_out_stamp_is_trained_on() -> None:
    stamps = stamps_of(("a/cat.png", "A cat."), ("a/cat9.png", "A new cat."), ("a/dog.png", "A dog."))
    train, heldout, variants = split_stamps(stamps, ["a/cat.png"])
    assert [stamp.name for stamp in train] == ["a/dog.png"]
    assert [stamp.name for stamp in heldout] == ["a/cat.png"]
    assert [stamp.name for stamp in variants] == ["a/cat9.png"]


def test_the_list_of_held_out_stamps() -> None:
    names = read_heldout()
    assert len(names) >= 100
    assert names == sorted(set(names))
    assert all(name.endswith(".png") and not name.startswith(("symbols/", "/")) for name in names)


def draw(path: Path, color: str = "red", size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", size, color).save(path)


def test_stamps_are_read_with_a_reason_for_each_that_is_not(tmp_path: Path) -> None:
    draw(tmp_path / "animals/cat.png")
    (tmp_path / "animals/cat.txt").write_text("A cat!\nde.utf8=Eine Katze!\n", encoding="utf-8")
    draw(tmp_path / "animals/tape.png")
    draw(tmp_path / "animals/tape_mirror.png")
    (tmp_path / "animals/tape.txt").write_text("A tape.\n")
    draw(tmp_path / "animals/mug.png")
    (tmp_path / "animals/mug.txt").write_text("A mug.\n")
    (tmp_path / "animals/mug.dat").write_text("nomirror\n")
    draw(tmp_path / "animals/unnamed.png")
    draw(tmp_path / "symbols/a.png")
    (tmp_path / "animals/cow.svg").touch()
    stamps, skipped = read_stamps(tmp_path, NOTHING_BY_HAND)
    assert [(stamp.name, stamp.caption, stamp.mirrorable) for stamp in stamps] == [
        ("animals/cat.png", "A cat.", True),
        ("animals/mug.png", "A mug.", False),
        ("animals/tape.png", "A tape.", False),
        ("animals/tape_mirror.png", "A tape.", False),
    ]
    assert skipped == {
        "stamp is a letter, digit or symbol": 1,
        "stamp is an SVG drawing": 1,
        "stamp's caption does not say what it shows": 1,
    }


def test_emoji_that_show_no_thing_are_counted_by_reason(tmp_path: Path) -> None:
    def record(name: str, short_name: str, category: str, **more: object) -> dict:
        return {"name": name, "short_name": short_name, "category": category, "unified": short_name.upper(), **more}

    draw(tmp_path / "apple.png")
    draw(tmp_path / "sparkles.png")
    records = [
        record("RED APPLE", "apple", "Food & Drink"),
        record("PEAR", "pear", "Food & Drink"),
        record("SPARKLES", "sparkles", "Activities"),
        record("Egypt Flag", "flag-eg", "Flags"),
        record("WAVING HAND", "wave", "People & Body", skin_variations={"1": {}, "2": {}}),
        record("CLOCK FACE ONE OCLOCK", "clock1", "Travel & Places"),
    ]
    overrides = CaptionOverrides({}, {"sparkles": None}, {}, frozenset(), frozenset())
    pictures, skipped = emoji_pictures("emoji", records, tmp_path, ".png", overrides)
    assert [(picture.name, picture.caption) for picture in pictures] == [("apple.png", "A red apple.")]
    assert skipped == {
        "emoji has no picture in this set": 1,
        "emoji is a symbol, not a thing": 1,
        "emoji is of the category Flags": 1,
        "emoji is of the category People & Body": 1,
        "emoji is one of 24 clock faces": 1,
        "emoji is a skin tone variant": 2,
    }


def test_photographs_of_classes_that_share_a_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("n02012849_crane.jpg", "n03126707_crane.jpg", "n01443537_goldfish.jpg", "holiday.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "README.md").touch()
    pictures, skipped = photograph_pictures(tmp_path, CaptionOverrides.load())
    assert [picture.caption for picture in pictures] == [
        "A goldfish.",
        "A crane, a tall bird.",
        "A construction crane.",
    ]
    assert sum(skipped.values()) == 2


def test_the_plain_view_is_the_whole_cutout_on_white() -> None:
    cutout = Image.new("RGBA", (120, 120), (0, 0, 0, 0))
    cutout.paste((255, 0, 0, 255), (30, 30, 90, 60))
    view = on_white(cutout)
    assert (view.size, view.mode) == ((VIEW_SIZE, VIEW_SIZE), "RGB")
    assert view.getpixel((0, 0)) == (255, 255, 255)
    assert view.getpixel((VIEW_SIZE // 2, VIEW_SIZE // 2)) == (255, 0, 0)


def test_views_depend_on_the_seed_alone() -> None:
    photograph = Image.effect_noise((400, 300), 80)
    cutout = Image.effect_noise((90, 60), 80).convert("RGBA")

    def bytes_of(seed: int) -> list[bytes]:
        views = cutout_views(cutout, 4, True, [photograph.convert("RGB")], random.Random(seed))
        views += photograph_views(photograph, 4, True, random.Random(seed))
        assert all((view.size, view.mode) == ((VIEW_SIZE, VIEW_SIZE), "RGB") for view in views)
        return [view.tobytes() for view in views]

    assert bytes_of(1) == bytes_of(1)
    assert bytes_of(1) != bytes_of(2)
    assert len(set(bytes_of(1))) == 8


def test_pictures_with_writing_are_never_mirrored() -> None:
    cutout = Image.new("RGBA", (60, 60), "red")
    cutout.paste((0, 0, 255, 255), (0, 0, 30, 60))
    for view in cutout_views(cutout, 12, False, [], random.Random(0)):
        columns = [x for x in range(VIEW_SIZE) for y in (VIEW_SIZE // 2,) if view.getpixel((x, y)) == (0, 0, 255)]
        others = [x for x in range(VIEW_SIZE) for y in (VIEW_SIZE // 2,) if view.getpixel((x, y)) == (255, 0, 0)]
        assert not columns or not others or max(columns) < min(others)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in ("n01443537_goldfish", "n02123045_tabby"):
        Image.effect_noise((90, 70), 60).save(folder / f"{name}.jpg")
    (folder / "n02085620_Chihuahua.jpg").write_bytes(b"no picture")
    return folder


def arguments(output: Path, photographs: Path) -> list[str]:
    return [
        *("--output", str(output), "--photographs", str(photographs)),
        *("--sources", "photographs", "--plain-backgrounds", "--views", "3"),
    ]


def test_the_folder_holds_pictures_captions_and_a_report(tmp_path: Path, photographs: Path) -> None:
    output = tmp_path / "data"
    assert prepare_data.main(arguments(output, photographs)) == 0
    dataset = datasets.load_from_disk(output)
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 6}
    assert dataset["train"].column_names == ["image", "caption", "source", "split", "name"]
    assert dataset["train"][0]["image"].size == (VIEW_SIZE, VIEW_SIZE)
    assert set(dataset["train"]["caption"]) == {"A goldfish.", "A tabby cat."}
    assert set(dataset["train"]["split"]) == {"train"}
    report = json.loads((output / "report.json").read_text())
    assert report["rows"]["train"] == {"imagenet-sample-images": 6}
    assert report["skipped"] == {"picture of imagenet-sample-images cannot be read": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "photographs"]


def test_the_same_seed_gives_the_same_data(tmp_path: Path, photographs: Path) -> None:
    def pictures(name: str, *more: str) -> list[bytes]:
        assert prepare_data.main([*arguments(tmp_path / name, photographs), *more]) == 0
        rows = datasets.load_from_disk(tmp_path / name)["train"].cast_column("image", datasets.Image(decode=False))
        return [row["image"]["bytes"] for row in rows]

    assert pictures("one") == pictures("two")
    assert pictures("one", "--overwrite") != pictures("three", "--seed", "1")


def test_a_failed_run_leaves_the_old_data_and_nothing_else(
    tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "data"
    assert prepare_data.main(arguments(output, photographs)) == 0

    def fail(image: Image.Image) -> bytes:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(prepare_data, "encode_jpeg", fail)
    assert prepare_data.main([*arguments(output, photographs), "--overwrite"]) == 1
    assert "out of memory" in capsys.readouterr().err
    assert len(datasets.load_from_disk(output)["train"]) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "photographs"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--photographs", "nowhere"], "--photographs got nowhere, expected a folder"),
        (["--sources", "photographs"], "needs --photographs DIR"),
        (["--views", "0"], "--views got 0, expected 1 or more"),
        (["--output", "."], "pass --overwrite"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        prepare_data.main(["--output", str(tmp_path / "data"), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_photographs_is_refused(
    tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    assert prepare_data.main(arguments(tmp_path / "data", tmp_path / "empty")) == 1
    assert "the source photographs gave no picture" in capsys.readouterr().err


def test_without_a_network_it_says_what_failed_and_what_to_do(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, str(TINY / "prepare_data.py"), "--output", str(tmp_path / "data")),
            *("--sources", "google-emoji"),
        ],
        env={
            **os.environ,
            "npm_config_registry": "http://127.0.0.1:9/",
            "npm_config_fetch_retries": "0",
            "npm_config_cache": str(tmp_path / "npm"),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    message = result.stderr.strip().splitlines()[-1]
    assert "emoji-datasource-google" in message
    assert "--downloads" in message
    assert not (tmp_path / "data").exists()


def test_the_sample_photographs_are_small_and_accounted_for() -> None:
    folder = TINY / "photographs"
    listed = (folder / "README.md").read_text(encoding="utf-8")
    photographs = sorted(folder.glob("*.jpg"))
    assert len(photographs) >= 6
    for path in photographs:
        assert f"`{path.name}`" in listed
        assert path.stat().st_size <= 200_000
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            assert picture.format == "JPEG"
            assert min(picture.size) >= 256
