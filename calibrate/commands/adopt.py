"""Directions of another tool as vectors: `calibrate extract MODEL --directions FILE`."""

import argparse
from pathlib import Path

from calibrate.commands import digest, identity, is_done, load
from calibrate.concepts import TARGET


def adopt(arguments: argparse.Namespace) -> None:
    """Directions of another tool, from a safetensors file, with the unit of this model's neutral text."""
    from accelerate import PartialState

    from calibrate import corpora, extraction, formats, models, shards

    ignored = ("stories", "concepts", "deflection", "reference", "check")
    given = [name for name in ignored if getattr(arguments, name)]
    usual = {"splits": ["train"], "recipes": ["paper"], "target": TARGET, "twins": None, "seed": 0}
    usual |= {} if arguments.sae_rows else {"sae_tensor": "W_dec"}
    if given := given + [name.replace("_", "-") for name, value in usual.items() if getattr(arguments, name) != value]:
        raise ValueError(f"`--directions` makes nothing of {', '.join(f'`--{name}`' for name in given)}; leave it out")
    dialogues = [row for row in corpora.load_neutral(arguments.neutral) if row.split == "train"]
    if len(dialogues) < 2:
        raise ValueError(f'{len(dialogues)} neutral dialogues with `"split": "train"`; mu and sigma need at least 2')
    checkpoint = load(arguments)
    config = models.text_config(checkpoint.model)
    if arguments.sae_rows:
        if arguments.layers is None or len(arguments.layers) != 1:
            raise ValueError("`--sae-rows` needs `--layers` with the one layer of the SAE")
        pairs = [_row(pair) for pair in arguments.sae_rows]
        if len(rows := dict(pairs)) < len(pairs):
            raise ValueError(
                f"`--sae-rows` names a concept twice ({', '.join(name for name, _ in pairs)}); give one row"
            )
        layers = arguments.layers
        models.check_layers(layers, config.num_hidden_layers)
        names, found = formats.load_sae_rows(arguments.directions, arguments.sae_tensor, rows, config.hidden_size)
    else:
        depth, hidden = config.num_hidden_layers, config.hidden_size
        names, layers, found = formats.load_directions(arguments.directions, depth, hidden)
        if missing := [layer for layer in arguments.layers or [] if layer not in layers]:
            raise ValueError(f"{arguments.directions} holds no directions at layers {missing}; it has {layers}")
        if arguments.layers:
            found = found[:, [layers.index(layer) for layer in sorted(arguments.layers)]]
            layers = sorted(arguments.layers)
    settings = identity(checkpoint) | {
        "recipe": "adopted", "file": arguments.directions.name, "sha256": file_digest(arguments.directions),
        "layers": layers, "sae_rows": arguments.sae_rows, "corpora": digest(dialogues),
    }  # fmt: skip
    if is_done(arguments.out, settings):
        return print(f"{arguments.out} already holds these vectors; nothing to do")
    items = {"neutral": extraction.neutral_items(checkpoint.tokenizer, dialogues)}
    group = shards.read(checkpoint, items, layers, arguments.out.with_name(f"{arguments.out.name}-states"))["neutral"]
    if not PartialState().is_main_process:
        return None
    neutral = extraction.neutral_states(group)
    extraction.make_vectors(checkpoint, names, found, neutral, layers, settings).save(arguments.out)
    print(f"{arguments.out}: {len(names)} concepts, layers {layers[0]} to {layers[-1]}")


def _row(pair: str) -> tuple[str, int]:
    name, _, row = pair.rpartition("=")
    if not name or not row.isdecimal():
        raise ValueError(f"`--sae-rows` {pair!r} is not NAME=ROW, such as desperate=123")
    return name, int(row)


def file_digest(path: Path) -> str | None:
    """The SHA-256 of a file, None where there is none."""
    import hashlib

    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
