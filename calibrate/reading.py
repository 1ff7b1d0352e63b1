"""Readings of a user's own records: JSONL in, JSONL out, in the input's order, streaming and resumable."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from calibrate import activations, models, transcripts
from calibrate.models import Checkpoint
from calibrate.shards import TOKEN_BUDGET
from calibrate.transcripts import Encoded
from calibrate.vectors import POOLINGS, EmotionVectors

ROLES = ("system", "user", "assistant", "tool")
WINDOW = 256  # records that are sorted by length together, and the unit of resuming


class Record(NamedTuple):
    """One line of the input: running text, or a transcript."""

    id: str
    text: str | None
    messages: list[dict[str, str]] | None


def read_records(path: Path) -> Iterator[Record]:
    """Yields the records of a JSONL file, one line at a time.

    Raises:
        ValueError: the file is missing, or a line is not UTF-8, or neither `{"id", "text"}` nor `{"id", "messages"}`;
            the message names file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a JSONL file")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: not UTF-8 text ({error.reason} at byte {error.start} of the line); save it as UTF-8"
                ) from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg}); each line is one JSON object") from error
            if not isinstance(row, dict) or not isinstance(row.get("id"), str | int):
                raise ValueError(f'{where}: lacks an `id`; give {{"id", "text"}} or {{"id", "messages"}}')
            text, messages = row.get("text"), row.get("messages")
            if (text is None) == (messages is None):
                raise ValueError(f"{where}: needs either `text` or `messages`; it has {sorted(row)}")
            if text is not None and not (isinstance(text, str) and text.strip()):
                raise ValueError(f"{where}: `text` is not a text with words in it")
            if messages is not None and not _are_messages(messages):
                raise ValueError(
                    f"{where}: `messages` is not a list of objects with texts `role` ({', '.join(ROLES)}) and "
                    "`content`, the last of them not a system message"
                )
            yield Record(row["id"], text, messages)


def _are_messages(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in messages)
        and messages[-1]["role"] != "system"
    )


def read_file(
    checkpoint: Checkpoint,
    vectors: EmotionVectors,
    source: Path,
    out: Path,
    layers: list[int] | None = None,
    tokens: bool = False,
) -> int:
    """Writes the readings of every record of `source` to `out`, and what they are to `OUT.meta.json`.

    Works in `OUT.part`, which a later call goes on with, and renames it when it is whole.

    Args:
        layers: a reading is the mean over these; the vectors' `reading_layers` by default. Where a text has no tokens
            of a role (a transcript without a reply, a text of one token) its readings are null.
        tokens: add per-token readings.

    Returns:
        the number of records; 0 where `out` already holds this very result.

    Raises:
        ValueError: a bad line; a layer that is not stored; or `out` or `OUT.part` holds something else.
    """
    chosen = layers or vectors.reading_layers()
    at = vectors.positions(chosen)
    count = sum(1 for _ in read_records(source))  # refuses a bad line before any work
    if not count:
        raise ValueError(f"{source}: the file holds no records; give at least one")
    meta = _meta(checkpoint, vectors, source, chosen, tokens)
    meta_path, part = out.with_name(f"{out.name}.meta.json"), out.with_name(f"{out.name}.part")
    kept = json.loads(meta_path.read_text(encoding="utf-8")) if meta_path.is_file() else None
    if out.exists() or part.exists():
        if kept != meta:
            differing = sorted(key for key in meta if (kept or {}).get(key) != meta[key])
            raise ValueError(
                f"{out} holds readings with another configuration (differing: {', '.join(differing)}); choose another "
                "`--out` or delete it, its .part and its .meta.json"
            )
        if out.exists():
            return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}.meta.partial")
    aside.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, meta_path)
    done = _whole_windows(part)
    scales = _scales(vectors, at)
    records = itertools.islice(read_records(source), done, None)
    with part.open("a", encoding="utf-8") as file, tqdm(total=count, initial=done, desc="reading", unit="text") as bar:
        while window := list(itertools.islice(records, WINDOW)):
            for line in _readings(checkpoint, vectors, scales, window, chosen, tokens):
                file.write(line + "\n")
            file.flush()
            bar.update(len(window))
    os.rename(part, out)
    return count


def _meta(checkpoint: Checkpoint, vectors: EmotionVectors, source: Path, layers: list[int], tokens: bool) -> dict:
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "input": {"name": source.name, "sha256": digest},
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "weight_hash": checkpoint.weight_hash,
        "adapter": checkpoint.adapter_hash,
        "chat_template": checkpoint.tokenizer.chat_template,
        "plain_roles": list(transcripts.plain_roles(checkpoint.tokenizer)),
        "vectors": {
            "model": vectors.model,
            "weight_hash": vectors.weight_hash,
            "recipe": vectors.recipe,
            "content": vectors.content_hash(),
        },
        "layers": layers,
        "band": vectors.band,
        "layer_choice": vectors.layer_choice.reason if vectors.layer_choice else None,
        "unit": "sigma: (projection - mean) / standard deviation along the direction, mean over layers",
        "sigma_source": f"neutral text in {vectors.model}, for each layer and pooling (text, header, reply, token)",
        "tokens": tokens,
        "versions": {name: version(name) for name in ("calibrate", "torch", "transformers")},
    }


def _whole_windows(part: Path) -> int:
    """Cuts off what a stop left of a window, so that batches stay those of an unbroken run; returns how many lines."""
    if not part.is_file():
        return 0
    done = end = position = 0
    with part.open("rb+") as file:
        for number, line in enumerate(file, 1):
            position += len(line)
            if number % WINDOW == 0 and line.endswith(b"\n"):
                done, end = number, position
        file.truncate(end)
    return done


Scales = dict[str, tuple[Tensor, Tensor]]


def _scales(vectors: EmotionVectors, at: list[int]) -> Scales:
    """By pooling: mu [layers, hidden], and directions over sigma [concepts, layers, hidden], at the layers `at`."""
    scales = {}
    for pooling in POOLINGS:
        mu, sigma = vectors.scale(pooling)
        scales[pooling] = mu[at], vectors.directions[:, at].double() / sigma[:, at, None]
    return scales


def _readings(
    checkpoint: Checkpoint,
    vectors: EmotionVectors,
    scales: Scales,
    window: list[Record],
    layers: list[int],
    tokens: bool,
) -> list[str]:
    limit = models.window(checkpoint.model)
    encoded = [_encode(checkpoint.tokenizer, record, limit) for record in window]
    lines = [""] * len(window)
    budget = TOKEN_BUDGET[next(checkpoint.model.parameters()).device.type]
    states = activations.states(checkpoint.model, [text.ids for text in encoded], layers, token_budget=budget)
    for row, hidden in states:
        hidden = hidden.cpu()
        spans = {span.role: slice(span.start, span.stop) for span in encoded[row].spans}  # the last of each role
        result: dict[str, Any] = {"id": window[row].id}
        if window[row].messages is None:
            whole = slice(activations.SINK_TOKENS, hidden.shape[1])
            result["readings"] = _named(vectors, hidden, whole, scales["text"])
        else:
            for role in ("header", "reply"):
                result[role] = _named(vectors, hidden, spans.get(role), scales[role])
        if tokens:
            result["tokens"] = _per_token(vectors, encoded[row], hidden, scales["token"])
        lines[row] = json.dumps(result, ensure_ascii=False)
    return lines


def _encode(tokenizer, record: Record, limit: int | None) -> Encoded:
    try:
        if record.messages is None:
            assert record.text is not None
            encoded = transcripts.encode_text(tokenizer, record.text)
        else:
            encoded = transcripts.encode(tokenizer, record.messages)
    except ValueError as error:
        raise ValueError(f"record {record.id!r}: {error}") from error
    if limit is not None and len(encoded.ids) > limit:
        raise ValueError(
            f"record {record.id!r} has {len(encoded.ids)} tokens; the model takes {limit}: cut it into parts with ids "
            "of their own"
        )
    return encoded


def _scaled(states: Tensor, scale: tuple[Tensor, Tensor]) -> Tensor:
    """Readings in sigma, mean over layers, [..., concepts], of states [..., layers, hidden]."""
    mu, directions = scale
    return torch.einsum("...lh,clh->...c", states.double() - mu, directions) / len(mu)


def _named(
    vectors: EmotionVectors, hidden: Tensor, part: slice | None, scale: tuple[Tensor, Tensor]
) -> dict[str, float] | None:
    """Concept -> reading of the mean over a part of the tokens; None where there are no such tokens."""
    start = max(part.start, activations.SINK_TOKENS) if part else 0
    if part is None or part.stop <= start:
        return None
    readings = _scaled(hidden[:, start : part.stop].mean(1, dtype=torch.float64), scale).tolist()
    return {concept: round(value, 4) for concept, value in zip(vectors.concepts, readings, strict=True)}


def _per_token(
    vectors: EmotionVectors, encoded: Encoded, hidden: Tensor, scale: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """The text and role of every token and its readings; the first, an attention sink, reads null."""
    readings = _scaled(hidden.transpose(0, 1), scale).T.tolist()
    return {
        "text": [encoded.text[start:stop] for start, stop in encoded.offsets],
        "role": [span.role for span in encoded.spans for _ in range(span.start, span.stop)],
        "readings": {
            concept: [None, *(round(value, 4) for value in values[activations.SINK_TOKENS :])]
            for concept, values in zip(vectors.concepts, readings, strict=True)
        },
    }
