"""`calibrate extract`, `read` and `export`."""

import argparse
from pathlib import Path
from typing import Any

from calibrate.commands import check_splits, digest, identity, is_done, load
from calibrate.commands.adopt import adopt


def extract(arguments: argparse.Namespace) -> None:
    """Reads all texts in one pass and writes one folder of vectors for each split and recipe, and for deflection."""
    from accelerate import PartialState

    from calibrate import extraction, models, shards
    from calibrate.vectors import load_vectors

    arguments.layers = sorted({*arguments.layers}) if arguments.layers else None
    if arguments.directions:
        return adopt(arguments)
    if arguments.sae_rows:
        raise ValueError("`--sae-rows` needs `--directions FILE.safetensors`, the file that holds the SAE")
    if arguments.check and "train" not in arguments.splits:
        raise ValueError("`--check` measures the vectors of the train split; add `train` to `--splits`")
    if "contrastive" in arguments.recipes and set(arguments.splits) != {"train"}:
        raise ValueError("`--recipes contrastive` reads prompts, which have no splits; use it with `--splits train`")
    texts = _texts(arguments)
    reference = load_vectors(arguments.reference) if arguments.reference else None
    if reference is None:
        check_splits(["train", "selection"], texts["stories"], "; the choice of layers needs it")
    checkpoint = load(arguments)
    config = models.text_config(checkpoint.model)
    if reference is not None:
        reference.check(config.hidden_size, config.num_hidden_layers, checkpoint.weight_hash, checkpoint.name)
        reference.positions(arguments.layers or [])
        if (searched := reference.recipe.get("target", arguments.target)) != arguments.target:
            raise ValueError(f"`--target` is {arguments.target!r}, the reference's band is of {searched!r}; give that")
        if missing := [layer for layer in reference.band or [] if layer not in (arguments.layers or reference.layers)]:
            raise ValueError(f"`--layers` leaves out {missing} of the reference's band {reference.band}; add them")
    models.check_layers(arguments.layers or [], config.num_hidden_layers)
    layers = list(range(config.num_hidden_layers))
    if reference is not None:
        layers = sorted(arguments.layers or reference.layers)
    outputs = _outputs(arguments)
    common = _settings(arguments, checkpoint, reference, corpora_digest(texts))
    settings = {name: common | {"split": split, "recipe": recipe} for name, (split, recipe) in outputs.items()}
    if "deflection" in settings:
        settings["deflection"]["deflection"] = digest([(row.felt, row.text, row.spans) for row in texts["deflection"]])
    wanted = {name: outputs[name] for name in outputs if not is_done(arguments.out / name, settings[name])}
    if not wanted:
        return print(f"{arguments.out} already holds these vectors; nothing to do")
    items = _items(checkpoint.tokenizer, texts, wanted, arguments.check, reference is None)
    groups = shards.read(checkpoint, items, layers, arguments.out / "states")
    if PartialState().is_main_process:  # the other processes have only read
        own = extraction.neutral_states(groups["neutral"])  # at every layer only where layers are chosen
        concepts = list(dict.fromkeys(story.concept for story in texts["stories"]))
        reads = {}
        for split in (split for split in ("train", "selection", "audit") if f"stories-{split}" in groups):
            rows = [story for story in texts["stories"] if story.split == split]
            contrast = groups.get("contrast")
            reads[split] = extraction.Read(rows, groups[f"stories-{split}"], own["token"], concepts, contrast)
        _write(arguments, checkpoint, texts, groups, own, reads, reference, wanted, settings)


def _texts(arguments: argparse.Namespace) -> dict[str, list]:
    """The rows that an extraction reads, checked before a model is loaded."""
    from calibrate import corpora

    stories = corpora.load_stories(arguments.stories)
    known = list(dict.fromkeys(story.concept for story in stories))
    for concept in (arguments.target, *(arguments.concepts or [])):
        if concept not in known:
            raise ValueError(
                f"the stories have none about {concept!r}; they have {', '.join(sorted(known))}; set `--target` or "
                "`--concepts`"
            )
    if arguments.concepts and arguments.target not in arguments.concepts:
        raise ValueError(f"the target {arguments.target!r} is not among `--concepts` {', '.join(arguments.concepts)}")
    stories = [story for story in stories if story.concept in (arguments.concepts or known)]
    check_splits([*arguments.splits, *(["audit"] if arguments.check else [])], stories)
    dialogues = [row for row in corpora.load_neutral(arguments.neutral) if row.split == "train"]
    if len(dialogues) < 2:
        raise ValueError(f'{len(dialogues)} neutral dialogues with `"split": "train"`; mu and sigma need at least 2')
    hidden = []
    if arguments.deflection:
        path = None if arguments.deflection is True else Path(arguments.deflection)
        hidden = [row for row in corpora.load_deflection(path) if row.split == "train"]
        if len({row.felt for row in hidden}) < 2:
            raise ValueError('deflection needs dialogues of two felt concepts or more with `"split": "train"`')
        check_splits(["train"], stories, "; deflection vectors need it")
    twins = [twin for twin in corpora.load_twins(arguments.twins) if twin[0].split == "selection"]
    in_train = {story.concept for story in stories if story.split == "train"}
    if in_train and (only := sorted({story.concept for story in stories} - in_train)):
        raise ValueError(f"the stories about {', '.join(only)} have none of split 'train'; every concept needs some")
    return {"stories": stories, "neutral": dialogues, "deflection": hidden, "twins": twins}


def corpora_digest(texts: dict[str, list]) -> str:
    """Of what directions, layers and band are computed from; ids, replies and the traits of tasks may change."""
    stories = [(story.concept, story.topic, story.split, story.text) for story in texts["stories"]]
    dialogues = [row.messages for row in texts["neutral"]]
    return digest([stories, dialogues, [context.messages for twin in texts["twins"] for context in twin]])


def _outputs(arguments: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Folder name -> (split, recipe)."""
    outputs = {
        split if recipe == "paper" else f"{split}-{recipe}": (split, recipe)
        for split in arguments.splits
        for recipe in arguments.recipes
    }
    return outputs | ({"deflection": ("train", "deflection")} if arguments.deflection else {})


def _settings(arguments: argparse.Namespace, checkpoint, reference, corpora: str) -> dict[str, Any]:
    """Everything that vectors depend on, split and recipe apart."""
    from calibrate import extraction

    return {
        **identity(checkpoint),
        "start_fraction": extraction.START_FRACTION,
        "neutral_variance": extraction.NEUTRAL_VARIANCE,
        "layers": sorted(arguments.layers) if arguments.layers else None,
        "target": arguments.target,
        "seed": arguments.seed,
        "checked": arguments.check,
        "corpora": corpora,
        "reference": digest(reference.recipe) if reference else None,
        "stories_by": "written for this project by a language model, one by one (see calibrate/corpora/README.md)"
        if arguments.stories is None
        else str(arguments.stories.name),
    }


def _items(tokenizer, texts: dict[str, list], wanted: dict, check: bool, choose: bool) -> dict[str, list]:
    """Every text that is to be read, by the name of its group."""
    from calibrate import extraction, transcripts

    stories = texts["stories"]
    splits = {split for split, _ in wanted.values()} | ({"audit", "train"} if check else set())
    splits |= {"train", "selection"} if choose else set()
    items = {
        f"stories-{split}": extraction.story_items(tokenizer, [story for story in stories if story.split == split])
        for split in sorted(splits)
    }
    items["neutral"] = extraction.neutral_items(tokenizer, texts["neutral"])
    for context in [context for twin in texts["twins"] for context in twin] if choose else []:
        try:
            transcripts.encode(tokenizer, context.messages)  # said here: the band is searched when all else is read
        except ValueError as error:
            raise ValueError(f"context {context.id!r}: {error}") from error
    if "deflection" in wanted:
        items["deflection"] = extraction.deflection_items(tokenizer, texts["deflection"])
    concepts = list(dict.fromkeys(story.concept for story in stories))
    if any(recipe == "contrastive" for _, recipe in wanted.values()):
        dialogues = texts["neutral"][: extraction.CONTRASTIVE_DIALOGUES]
        items["contrast"] = extraction.contrastive_items(tokenizer, concepts, dialogues)
    return items


def _write(arguments, checkpoint, texts, groups, own, reads, reference, wanted, settings) -> None:
    """Chooses the layers, then makes, checks and saves every wanted folder; `own` holds the model's neutral states."""
    import torch

    from calibrate import checks, extraction
    from calibrate.layers import choose_band

    everywhere = groups["neutral"].layers
    if reference is None:
        depth = len(everywhere)
        searched = sorted(arguments.layers or extraction.candidate_layers(depth))
        stored = searched if arguments.layers else [*searched, *extraction.later_layers(depth)]
        choice = _layer_choice(reads, searched)
        kept = [everywhere.index(layer) for layer in stored]
        neutral = {pooling: rows[:, kept] for pooling, rows in own.items()}
    else:
        stored, choice = everywhere, reference.layer_choice
        neutral = {pooling: reference.neutral_at(pooling, stored) for pooling in own}
    slim = {split: read.only(stored) for split, read in reads.items()}

    def make(split: str, recipe: str, name: str):
        read = slim[split]
        concepts, found = read.concepts, None
        if recipe == "deflection":
            group = groups["deflection"].only(stored)
            concepts, found = extraction.deflection_directions(group, texts["deflection"], read.tokens)
        else:
            found = extraction.by_recipe(recipe, read, arguments.seed)
        vectors = extraction.make_vectors(checkpoint, concepts, found, neutral, stored, settings[name])
        vectors.layer_choice = choice
        return vectors

    if reference is None:
        source = make("train", "paper", next(iter(wanted)))
        accuracy = torch.tensor([choice.accuracy[layer] for layer in stored])
        choose_band(checkpoint, source, arguments.target, texts["twins"], accuracy, searched)
    else:
        source = reference
    for name, (split, recipe) in wanted.items():
        vectors = make(split, recipe, name)
        vectors.set_band(source.band, source.band_reason, _at(source, stored))
        if arguments.check and split == "train" and recipe != "deflection":
            vectors.checks = checks.run(checkpoint, vectors, slim["train"], slim["audit"], recipe)
            print(_table(name, vectors.checks, vectors.concepts))
        vectors.save(arguments.out / name)
        print(f"{arguments.out / name}: {len(vectors.concepts)} concepts, layers {stored[0]} to {stored[-1]}")
    print(f"Layers for reading: {choice.reason if choice else 'those of the reference'}")
    print(f"Band for training: {source.band_reason}")


def _at(source, layers: list[int]) -> dict[str, list[float]] | None:
    """The figures of the band search at `layers`."""
    at = source.positions(layers)
    return source.band_search and {name: [series[i] for i in at] for name, series in source.band_search.items()}


def _layer_choice(reads: dict, searched: list[int]):
    """Decoding of the selection topics by the training topics' directions, at every layer."""
    from calibrate import extraction, layers

    train, selection = reads["train"], reads["selection"]
    directions = extraction.by_recipe("paper", train)
    centre = extraction.concept_means(train.group, train.labels, train.concepts).mean(0)
    truth = [train.concepts.index(label) for label in selection.labels]
    ranks, _ = layers.held_out_ranks(directions, centre, selection.group, truth)
    return layers.choose_layers((ranks == 0).double().mean(0), len(truth), 1 / len(train.concepts), searched)


def _table(name: str, found: dict[str, Any], concepts: list[str]) -> str:
    from calibrate.vectors import check_rows

    return "\n".join([f"Checks of {name}:", *(f"  {key:55} {value}" for key, value in check_rows(found, concepts))])


def read(arguments: argparse.Namespace) -> None:
    """Readings of a user's records."""
    from calibrate import models, reading
    from calibrate.vectors import load_vectors

    vectors = load_vectors(arguments.vectors)
    arguments.layers = sorted({*arguments.layers}) if arguments.layers else None
    vectors.positions(arguments.layers or [])
    for _ in reading.read_records(arguments.texts):  # a bad line is refused before a model is loaded
        pass
    if not arguments.model:  # the very weights that they were made from
        arguments.model, arguments.revision = vectors.model, arguments.revision or vectors.model_revision
    checkpoint = load(arguments)
    config = models.text_config(checkpoint.model)
    vectors.check(config.hidden_size, config.num_hidden_layers, checkpoint.weight_hash, checkpoint.name)
    count = reading.read_file(checkpoint, vectors, arguments.texts, arguments.out, arguments.layers, arguments.tokens)
    print(
        f"{arguments.out}: {count} records"
        if count
        else f"{arguments.out} already holds these readings; nothing to do"
    )


def export(arguments: argparse.Namespace) -> None:
    """Vectors in another format."""
    from calibrate import formats
    from calibrate.vectors import load_vectors

    vectors = load_vectors(arguments.vectors)
    out: Path = arguments.out
    if out.exists():
        raise ValueError(f"{out} exists; choose another `--out` or delete it")
    if arguments.format != "folder" and (arguments.layers or arguments.half):
        raise ValueError("`--layers` and `--half` go with `--format folder` only")
    if arguments.format != "gguf" and arguments.concepts:
        raise ValueError("`--concepts` goes with `--format gguf` only; the other formats hold all concepts")
    if arguments.format == "folder":
        formats.export_folder(vectors, sorted({*(arguments.layers or vectors.layers)}), out, arguments.half)
    elif arguments.format == "persona":
        formats.export_persona(vectors, out)
    else:
        for concept in arguments.concepts or vectors.concepts:
            vectors.index(concept)
        for concept in arguments.concepts or vectors.concepts:
            formats.export_gguf(vectors, concept, out / f"{concept.replace(' ', '-')}.gguf", arguments.hint)
    print(f"{out}: written")
