"""How the names that pictures come with are turned into captions that people would say.

Every caption is one short sentence with a capital letter at the start and a full stop at the end. Rules make most of
them; `captions.json` has the ones that no rule gets right, and `null` for pictures that no sentence of this kind fits.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path


CAPTIONS_FILE = Path(__file__).parent / "captions.json"
KINDS_FILE = Path(__file__).parent / "photograph_kinds.json"

# Words that emoji.json writes in capitals like everything else, and that keep their capital in a sentence.
PROPER_WORDS = {
    word.lower(): word for word in ("American", "Christmas", "European", "French", "Hindu", "Japanese", "T-shirt")
}
# Spelling and sound part ways here: "an hourglass", "a unicorn", "a one-piece swimsuit".
VOWEL_SOUND = re.compile(r"(?!uni|use|euro|one-|once|u-|uk\b|ewe)[aeiou]|hour|honest|heir|x-ray|f-", re.IGNORECASE)

STAMP_ASIDE = re.compile(r"\s*\(.*?\)")
STAMP_FIRST_SENTENCE = re.compile(r"(?<=[.!?…])\s+")
TYPOGRAPHIC_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": None, "\u201d": None})


@dataclass(frozen=True)
class CaptionOverrides:
    """
    What was written by hand about single pictures.

    Args:
        stamps (`dict[str, str | None]`):
            Captions of stamps by their path without suffix. `None` marks a picture to leave out.
        emoji (`dict[str, str | None]`):
            Captions of emoji by their short name. `None` marks a picture to leave out.
        photographs (`dict[str, str]`):
            What photographs show, as `"a male duck"`, by class name or, where two classes share one, by file name.
        emoji_with_writing (`frozenset[str]`):
            Short names of the emoji that a mirror image would turn into nonsense, because of writing or a map in them.
        photographs_with_writing (`frozenset[str]`):
            Classes of photographs of which the same is true.
    """

    stamps: dict[str, str | None]
    emoji: dict[str, str | None]
    photographs: dict[str, str]
    emoji_with_writing: frozenset[str]
    photographs_with_writing: frozenset[str]

    @classmethod
    def load(cls, path: Path = CAPTIONS_FILE) -> "CaptionOverrides":
        """Read the file beside this module."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            stamps=content["stamps"],
            emoji=content["emoji"],
            photographs=content["photographs"],
            emoji_with_writing=frozenset(content["emoji_with_writing"]),
            photographs_with_writing=frozenset(content["photographs_with_writing"]),
        )


def with_article(name: str) -> str:
    """`"apple"` becomes `"an apple"`."""
    return f"an {name}" if VOWEL_SOUND.match(name) else f"a {name}"


def as_sentence(text: str) -> str:
    """`"an apple"` becomes `"An apple."`."""
    text = text.strip().rstrip(".!?… ")
    return f"{text[:1].upper()}{text[1:]}."


def stamp_caption(first_line: str) -> str:
    """
    The caption of a Tux Paint stamp: the first sentence of the line beside it, without asides and exclamation marks.

    >>> stamp_caption("A wheelie bin! Give me your trash!")
    'A wheelie bin.'
    """
    text = STAMP_ASIDE.sub("", first_line.translate(TYPOGRAPHIC_QUOTES)).strip()
    return as_sentence(STAMP_FIRST_SENTENCE.split(text, maxsplit=1)[0])


def emoji_caption(unicode_name: str) -> str:
    """
    The caption of an emoji that shows a thing, from its Unicode name.

    >>> emoji_caption("RED APPLE")
    'A red apple.'
    """
    words = (PROPER_WORDS.get(word, word) for word in unicode_name.lower().translate(TYPOGRAPHIC_QUOTES).split())
    return as_sentence(with_article(" ".join(words)))


def photograph_caption(class_name: str) -> str:
    """
    The caption of an ImageNet photograph, from its class's name. WordNet's capitals are those of running text.

    >>> photograph_caption("Irish_setter")
    'An Irish setter.'
    """
    return as_sentence(with_article(class_name.replace("_", " ")))


def photograph_kind(synset: str) -> str | None:
    """
    What people call a thing of an ImageNet class first: the nearest of some hundred everyday nouns above the class in
    WordNet 3.0, or nothing. `photograph_kinds.json` has them.

    >>> photograph_kind("n02123045")  # tabby
    'cat'
    """
    return _kinds().get(synset)


@cache
def _kinds() -> dict[str, str]:
    content = json.loads(KINDS_FILE.read_text(encoding="utf-8"))
    return {synset: kind for kind, synsets in content.items() for synset in synsets.split()}


def is_caption(text: str) -> bool:
    """Whether a text is one short sentence, as every caption has to be."""
    return re.fullmatch(r"[A-Z][^.!?…\n]{2,79}\.", text) is not None
