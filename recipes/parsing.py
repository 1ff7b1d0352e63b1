"""Command lines of the sweeps: their own options, and those after `--` for the recipe."""

import argparse
import re
from pathlib import Path
from typing import Any

import yaml


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """A sweep's own words, and those after `--`."""
    return (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])


def names(words: list[str]) -> set[str]:
    """The options that are given, as a YAML writes them."""
    return {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def refuse(parser: argparse.ArgumentParser, words: list[str], own: set[str]) -> None:
    """Ends the program where options for the recipe are those that the sweep gives each run itself."""
    if wrong := sorted(names(words) & own):
        parser.error(f"the sweep gives each run its `{'`, `'.join(wrong)}`; leave it out after `--`")


def recipe(parser: argparse.ArgumentParser, path: Path, wanted: tuple[str, ...]) -> dict[str, Any]:
    """A recipe's or a launcher's YAML; ends the program where it cannot be read or lacks one of the `wanted`."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(" ".join(str(error).split()))
    for name in wanted:
        if name not in found:
            parser.error(f"{path} has no `{name}`; put it there")
    return found


def variant(text: str) -> str:
    if not all(re.fullmatch(r"\w+=[\w.+-]+", part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not OPTION=VALUE, or several with commas between them")
    return text
