"""The emotion concepts: name, family, and the words that name them."""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

TARGET = "desperate"  # the concept whose reading training lowers by default


class Concept(NamedTuple):
    """One emotion word of the study that this project builds on (arXiv 2604.07729)."""

    name: str
    family: str  # the study's k-means family
    valence: float  # 1 unpleasant to 9 pleasant; the source is named in concepts.yaml
    arousal: float  # 1 still to 9 stirred
    synonyms: tuple[str, ...]  # words that give it away; a prefix where it ends in `*`
    sense: str  # what sets it apart from its neighbours

    def leak(self, text: str) -> str | None:
        """The first word of `text` that names this concept or a listed synonym, else None."""
        found = pattern((self.name, *self.synonyms)).search(text)
        return found.group(0) if found else None


@cache
def pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    """Finds any of the words in a text, in any case; whole words, or beginnings where one ends in `*`."""
    alternatives = (re.escape(w[:-1]) + r"\w*" if w.endswith("*") else re.escape(w) + r"\b" for w in words)
    return re.compile(r"\b(?:" + "|".join(alternatives) + ")", re.IGNORECASE)


@cache
def load_concepts() -> dict[str, Concept]:
    """All shipped concepts by name, in the order of the file."""
    rows = yaml.safe_load(Path(__file__).with_name("concepts.yaml").read_text(encoding="utf-8"))
    return {name: Concept(name, **(row | {"synonyms": tuple(row["synonyms"])})) for name, row in rows.items()}
