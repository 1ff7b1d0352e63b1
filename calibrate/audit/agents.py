"""Plays the coding tasks with a local model: several rollouts at once, a line of JSON for each, resumable."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from calibrate import activations, models, transcripts
from calibrate.audit.rollouts import Rollout, Task
from calibrate.models import Checkpoint

logger = logging.getLogger(__name__)


class Settings(NamedTuple):
    """How rollouts are sampled."""

    samples: int = 1  # rollouts of each task, form and option
    max_new_tokens: int = 400  # of one answer
    temperature: float = 0.7  # 0: the likeliest token
    batch: int = 16  # rollouts that are played at once
    seed: int = 0


def play(checkpoint: Checkpoint, tasks: list[Task], settings: Settings, path: Path) -> list[dict[str, Any]]:
    """All rollouts of the tasks in both forms, with and without an exit option; rows of `Rollout.row`, in order.

    `path` gets a line as soon as a rollout is finished; those that it holds already are not played again. A batch is
    always the same rollouts with the same seed, so that a resumed run samples what an unbroken one does; one that was
    broken off within a batch plays that batch again.
    """
    every = [
        Rollout(task, impossible, exit_option, sample)
        for sample in range(settings.samples)
        for exit_option in (False, True)
        for impossible in (True, False)
        for task in tasks
    ]
    kept = {json.dumps(row["key"]): row for row in _rows(path)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(every), desc="playing tasks", unit="rollout") as bar:
        for start in range(0, len(every), settings.batch):
            batch = every[start : start + settings.batch]
            if not all(json.dumps(rollout.key()) in kept for rollout in batch):
                torch.manual_seed(settings.seed * 1_000_003 + start)
                _play_batch(checkpoint, batch, settings)
                rows = [rollout.row() for rollout in batch]
                kept |= {json.dumps(row["key"]): row for row in rows}
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                file.flush()
            bar.update(len(batch))
    return [kept[json.dumps(rollout.key())] for rollout in every]


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that a stopped run left; a last line that was cut is dropped, from the file too."""
    if not path.is_file():
        return []
    content = path.read_bytes()  # it may be cut inside a character
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.split(b"\n")[:-1]]


def _play_batch(checkpoint: Checkpoint, batch: list[Rollout], settings: Settings) -> None:
    window = models.window(checkpoint.model)
    while active := [rollout for rollout in batch if rollout.open]:
        texts = [transcripts.render(checkpoint.tokenizer, rollout.messages, header=True) for rollout in active]
        lengths = [len(checkpoint.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        fitting = []
        for rollout, text, length in zip(active, texts, lengths, strict=True):
            if window and length + settings.max_new_tokens > window:
                rollout.open, rollout.cut = False, True
            else:
                fitting.append((rollout, text))
        if fitting:
            replies = answer(checkpoint, [text for _, text in fitting], settings)
            for (rollout, _), reply in zip(fitting, replies, strict=True):
                rollout.take(reply)


@torch.no_grad()
def answer(checkpoint: Checkpoint, texts: list[str], settings: Settings) -> list[str]:
    """What the model adds to each text."""
    tokenizer, model = checkpoint.tokenizer, checkpoint.model
    sequences = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    batch = activations.collate(list(range(len(texts))), sequences, model.device, side="left")
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    made = model.generate(
        input_ids=batch.inputs["input_ids"],
        attention_mask=batch.inputs["attention_mask"],
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **(sampling if settings.temperature else {"do_sample": False}),
        # A checkpoint's own settings would stand in for what it says by itself.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_beams=1,
    )
    added = made[:, batch.inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(added, skip_special_tokens=True)


def reply(
    checkpoint: Checkpoint, chats: list[list[dict[str, str]]], settings: Settings, names: list[str]
) -> list[str | None]:
    """One reply to each chat, in order; None, with a warning that names it, where the two do not fit the window."""
    window = models.window(checkpoint.model) or 10**9
    encoded = [transcripts.encode(checkpoint.tokenizer, messages, "") for messages in chats]
    fitting = [i for i, text in enumerate(encoded) if len(text.ids) + settings.max_new_tokens <= window]
    fitting.sort(key=lambda i: len(encoded[i].ids))  # batches with little padding
    for name in dict.fromkeys(name for i, name in enumerate(names) if i not in fitting):
        logger.warning("%s: not answered, %d more tokens do not fit the window", name, settings.max_new_tokens)
    found: list[str | None] = [None] * len(chats)
    for start in tqdm(range(0, len(fitting), settings.batch), desc="writing replies", unit="batch"):
        rows = fitting[start : start + settings.batch]
        torch.manual_seed(settings.seed * 1_000_003 + start)
        for row, text in zip(rows, answer(checkpoint, [encoded[i].text for i in rows], settings), strict=True):
            found[row] = text
    return found
