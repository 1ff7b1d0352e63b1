"""
Continued pretraining on a selection of a scored pool: does text that models regulation change how a model reads?

```bash
python recipes/books.py 1260.txt 766.txt --out runs/pool/pool.parquet
curate score runs/pool/pool.parquet --out runs/pool/scores --tier 1
accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/pretrain.py \
    --config recipes/smollm2-135m/pretrain.yaml --selection curated --seed 0 --output_dir runs/pretrain/curated-seed0
```

Every selection draws as many tokens, from passages with a score, in the order of its seed: `curated` from the third of
each book with the highest regulation, `inverted` from the third with the lowest, `valence` from the third that VADER
calls most positive, `random` from all of them. The same command again goes on from the last checkpoint; a folder that
holds a run of another selection, pool or option is refused.

The pool of the figures in this folder: 12 books of Project Gutenberg (`recipes/books.py`), scored at tier 1.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SELECTIONS = ("curated", "random", "valence", "inverted")
# Beginnings of the options that change where and how a run reports, not what it computes.
NO_MATTER = ("output_dir", "run_name", "report_to", "log", "save_", "disable_tqdm", "resume_from", "hub_", "push_to")


@dataclass
class SelectionConfig:
    """Which passages are trained on."""

    pool: str = field(metadata={"help": "Parquet file with `id`, `text` and the group column."})
    scores: str = field(metadata={"help": "Folder that `curate score` wrote for it."})
    selection: str = field(metadata={"help": f"One of {', '.join(SELECTIONS)}."})
    tokens: int = field(default=20480, metadata={"help": "Tokens of a run: whole blocks of `max_length`."})
    group_column: str = field(default="book", metadata={"help": "Thirds are taken within each of its values."})


def top_third(score: np.ndarray, groups: list[str]) -> np.ndarray:
    """Whether each passage is in the highest third of its group; of ties the first."""
    chosen = np.zeros(len(score), bool)
    for group in set(groups):
        rows = np.array([i for i, name in enumerate(groups) if name == group])
        best = np.argsort(-score[rows], kind="stable")[: -(-len(rows) // 3)]
        chosen[rows[best]] = True
    return chosen


def valence(texts: list[str]) -> np.ndarray:
    """VADER's compound score, -1 to 1."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ValueError("`selection: valence` needs VADER; run `pip install vaderSentiment`") from None
    analyzer = SentimentIntensityAnalyzer()
    return np.array([analyzer.polarity_scores(text)["compound"] for text in texts])


def choose(selection: str, texts: list[str], regulation: np.ndarray, groups: list[str], seed: int) -> list[str]:
    """The texts that a selection may draw from, in the order of the seed.

    Args:
        regulation: of each passage, 0 to 1; NaN where it has none, and then it is never drawn.
    """
    scored = np.flatnonzero(~np.isnan(regulation))
    texts, groups = [texts[i] for i in scored], [groups[i] for i in scored]
    if selection == "random":
        rows = np.arange(len(scored))
    else:
        score = valence(texts) if selection == "valence" else regulation[scored]
        rows = np.flatnonzero(top_third(-score if selection == "inverted" else score, groups))
    return [texts[i] for i in np.random.default_rng(seed).permutation(rows)]


def blocks(tokenizer, texts: list[str], length: int, count: int) -> list[list[int]]:
    """`count` blocks of `length` tokens, passages one after another with the end token between them.

    Raises:
        ValueError: the passages have fewer tokens.
    """
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= length * count:
            return [ids[start : start + length] for start in range(0, length * count, length)]
    raise ValueError(f"`tokens` asks for {length * count:,}, the selection has {len(ids):,}; lower it or add texts")


def load(args: SelectionConfig) -> tuple[list[str], np.ndarray, list[str]]:
    """Texts, regulation (NaN where null) and groups of the pool, in the pool's order.

    Raises:
        ValueError: a column is missing, or the scores are of other documents.
    """
    import pyarrow.parquet as pq

    from data_curation import inputs, manifest

    scored = manifest.load(Path(args.scores))
    text_column, id_column = (scored["made_from"][name] for name in ("text_column", "id_column"))
    if inputs.digest(args.pool) not in scored["made_from"]["input"].values():
        raise ValueError(f"{args.scores} was not made from {args.pool} as it is now; score it again")
    if not scored["complete"]:
        raise ValueError(f"{args.scores} is not complete; run its `curate score` again")
    if id_column is None:
        raise ValueError(f"{args.scores} numbers the rows of {args.pool}; score it with a column of ids")
    pool = pq.read_table(args.pool)
    if missing := {args.group_column} - set(pool.column_names):
        raise ValueError(f"{args.pool}: no column {', '.join(sorted(missing))}; there are {pool.column_names}")
    table = pq.read_table(Path(args.scores) / "scores", columns=["id", "regulation"])
    scores = dict(zip(*(table[name].to_pylist() for name in ("id", "regulation")), strict=True))
    ids = [str(id_) for id_ in pool[id_column].to_pylist()]  # as scores have them
    unscored = [id_ for id_ in ids if id_ not in scores]
    if len(unscored) != scored["figures"]["set_aside"]:
        raise ValueError(
            f"{args.scores} lacks {len(unscored)} ids of {args.pool}, such as {next(iter(unscored), None)!r}; score it"
        )
    found = [scores.get(id_) for id_ in ids]  # of rows that were set aside: None
    regulation = np.array([np.nan if value is None else value for value in found], float)
    return pool[text_column].to_pylist(), regulation, [str(name) for name in pool[args.group_column].to_pylist()]


def claim(folder: Path, settings: dict[str, Any], option: str) -> None:
    """Takes a folder for these settings, which are kept in it.

    Raises:
        ValueError: it holds what other settings made.
    """
    settings, path = json.loads(json.dumps(settings, default=str)), folder / "settings.json"
    if not path.is_file() and ((folder / "finished").is_file() or any(folder.glob("checkpoint-*"))):
        raise ValueError(f"{folder} holds a run without its settings.json; choose another `{option}`")
    # A run that was refused before it began has left nothing but its claim: that is taken over.
    if not path.is_file() or not any(item.is_file() and item != path for item in folder.rglob("*")):
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f"settings.{os.getpid()}.partial"
        aside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)
    kept = json.loads(path.read_text(encoding="utf-8"))
    if differing := sorted(key for key in kept.keys() | settings.keys() if kept.get(key) != settings.get(key)):
        raise ValueError(
            f"{folder} was begun with other settings (differing: {', '.join(differing[:6])}); choose another "
            f"`{option}` or delete it"
        )


def settings_of(args: SelectionConfig, training_args, model_args) -> dict[str, Any]:
    """What a run depends on: its options, and the digests of pool and scores."""
    from data_curation.inputs import digest

    files = [Path(args.pool), *sorted((Path(args.scores) / "scores").rglob("*.parquet"))]
    options = {key: value for key, value in training_args.to_dict().items() if not key.startswith(NO_MATTER)}
    options |= {"processes": training_args.world_size}  # which blocks a step sees depends on it
    return asdict(args) | options | asdict(model_args) | {"data": [digest(str(file)) for file in files]}


def main(args: SelectionConfig, training_args, model_args) -> None:
    from datasets import Dataset
    from trl import SFTTrainer, get_peft_config

    from calibrate import models
    from calibrate.training import runs

    runs.refuse_model_options(model_args)
    runs.refuse_training_options(training_args)
    if args.selection not in SELECTIONS:
        raise ValueError(f"`selection` is {args.selection!r}; allowed: {', '.join(SELECTIONS)}")
    length = training_args.max_length
    if not length:
        raise ValueError(f"`max_length` is {length}; give the tokens of a block, 1 or more")
    if args.tokens < length:
        raise ValueError(f"`tokens` is {args.tokens}, less than one block of `max_length` {length}; raise it")
    out = Path(training_args.output_dir)
    claim(out, settings_of(args, training_args, model_args), "output_dir")
    if (out / "finished").is_file():
        return print(f"{out} already holds this run, finished; nothing to do")
    texts = choose(args.selection, *load(args), training_args.seed)
    checkpoint = models.load(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    if not model_args.use_peft:
        checkpoint.model.float()  # steps of an optimiser vanish in pure bf16
    peft_config = get_peft_config(model_args)
    if peft_config:
        peft_config.revision = model_args.model_revision  # of the base, which PEFT does not look up
    rows = blocks(checkpoint.tokenizer, texts, length, args.tokens // length)
    print(f"{args.selection}: {len(rows)} blocks of {length} tokens, of {len(texts):,} passages")
    trainer = SFTTrainer(
        model=checkpoint.model,
        args=training_args,
        processing_class=checkpoint.tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=runs.last_complete_checkpoint(out))
    trainer.save_model(str(out))
    if trainer.accelerator.is_main_process:
        aside = out / "finished.partial"
        aside.write_text("", encoding="utf-8")
        os.replace(aside, out / "finished")
    trainer.end()


if __name__ == "__main__":
    from trl import SFTConfig, TrlParser

    from calibrate.training.runs import USER_ERRORS, ModelOptions

    try:
        main(*TrlParser([SelectionConfig, SFTConfig, ModelOptions]).parse_args_and_config())  # ty: ignore
    except USER_ERRORS as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
