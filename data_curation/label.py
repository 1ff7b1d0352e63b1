"""`curate label`: asks an OpenAI-compatible teacher model for labels, evidence first; resumable, a row at a time."""

# ruff: noqa: T201 -- a command: it prints how far it came

import argparse
import hashlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from calibrate.generation import Request, Settings
from calibrate.writers import server_writer
from data_curation.facets import FACETS, STANCES

RUBRIC = Path(__file__).parent / "rubric.txt"
ATTEMPTS = 3  # at an answer that can be used; each with a seed of its own
KEPT = ("id", "writer", "text", "genre", "event", "pair", "cell", "tone")  # of the input, where it has them
BEGIN = b'{"id": '  # of each row of the output
ANSWER_TOKENS, TEMPERATURE = 700, 0.2  # at 0 a second attempt would repeat the first


def read_rows(path: Path, *needed: str) -> Iterator[dict[str, Any]]:
    """Yields the JSON objects of a JSONL file, each with `id`, a `text` with words in it, and what else is needed.

    Raises:
        ValueError: no such file, or a line is none of these, or repeats an id; names file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a JSONL file")
    with path.open("rb") as file:
        yield from _rows(file, path, needed)


def _rows(lines: Iterable[bytes], path: Path, needed: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    seen = set()
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{where}: not JSON in UTF-8 ({error}); each line is one JSON object") from error
        if not isinstance(row, dict) or (missing := {"id", "text", *needed} - row.keys()):
            lacking = ", ".join(sorted(missing)) if isinstance(row, dict) else "an object"
            raise ValueError(f"{where}: lacks {lacking}; each line needs {', '.join(('id', 'text', *needed))}")
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise ValueError(f"{where}: `text` is not a text with words in it")
        if isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
            raise ValueError(f"{where}: the id is {row['id']!r}, neither text nor whole number")
        if row["id"] in seen:
            raise ValueError(f"{where}: the id {row['id']!r} stands there twice; give each row its own")
        seen.add(row["id"])
        yield row


def label(
    source: Path, out: Path, url: str, model: str, key: str | None = None, concurrency: int = 1
) -> tuple[int, list[str]]:
    """Appends each row of `source` with the teacher's labels to `out`; rows that `out` has are not asked for again.

    Returns:
        the number of rows labelled in this call, and the ids whose answers could not be used, which `out` lacks.

    Raises:
        ValueError: a bad row, `out` holds labels of another teacher or rubric, or the server does not answer.
    """
    if out.resolve() == source.resolve():
        raise ValueError(f"{out} is the input itself; choose another `--out`")
    rows = list(read_rows(source))
    teacher = {"model": model, "rubric": hashlib.sha256(RUBRIC.read_bytes()).hexdigest()[:12]}
    done = _done(out, teacher)
    waiting = [row for row in rows if row["id"] not in done]
    ask = server_writer(url, Settings(model, temperature=TEMPERATURE, max_tokens=ANSWER_TOKENS), key)
    out.parent.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    bar = tqdm(total=len(rows), initial=len(rows) - len(waiting), desc="labelling", unit="passage")
    with bar, out.open("a", encoding="utf-8") as file, ThreadPoolExecutor(concurrency) as pool:
        for start in range(0, len(waiting), concurrency):
            batch = waiting[start : start + concurrency]
            for row, answer in zip(batch, pool.map(_answer, itertools.repeat(ask), batch), strict=True):
                bar.update()
                if answer is None:
                    failed.append(row["id"])
                    continue
                kept = {name: row[name] for name in KEPT if name in row}
                file.write(json.dumps(kept | answer | {"teacher": teacher}, ensure_ascii=False) + "\n")
                file.flush()
    return len(waiting) - len(failed), failed


def _done(out: Path, teacher: dict[str, str]) -> set[str]:
    """The ids that `out` holds, all by this teacher; then cuts off a last line that a kill left half written."""
    if not out.is_file():
        return set()
    content, done = out.read_bytes(), set()
    end = content.rfind(b"\n") + 1
    rest = content[end:]
    with suppress(ValueError):
        json.loads(rest)
        end = len(content)  # a whole row, without the end of its line
    for row in _rows(io.BytesIO(content[:end]), out, ()):
        if row.get("teacher") != teacher:
            raise ValueError(f"{out} holds labels by {row.get('teacher')}, not by {teacher}; choose another `--out`")
        done.add(row["id"])
    if end < len(content) and rest[: len(BEGIN)] != BEGIN[: len(rest)]:
        raise ValueError(f"{out} ends with {rest[:20]!r}, which no call has left there; choose another `--out`")
    if rest:
        with out.open("rb+") as file:
            file.truncate(end)
            file.seek(end)
            file.write(b"\n" if end == len(content) else b"")
    return done


def _answer(ask: Callable[[Request], str], row: dict[str, Any]) -> dict[str, Any] | None:
    """The labels of one row, or None where no attempt gave any."""
    prompt = RUBRIC.read_text(encoding="utf-8").replace("{text}", row["text"])
    for attempt in range(ATTEMPTS):
        seed = zlib.crc32(f"{row['id']} {attempt}".encode()) >> 1
        text = ask(Request("regulation", str(row["id"]), attempt, seed, prompt, [("reader", "labels")]))
        if (found := parse(text, row["text"])) is not None:
            return found
    return None


def parse(answer: str, text: str) -> dict[str, Any] | None:
    """The labels in an answer, or None where it breaks the rubric.

    What stands around the outermost braces is left out. Quotes that the passage lacks are left out of the evidence:
    a teacher that makes them up is to be seen by their number.
    """
    try:
        found = json.loads(answer[answer.index("{") : answer.rindex("}") + 1])
    except ValueError:
        return None
    facets, regulation = found.get("facets"), found.get("regulation", "missing")
    sound = isinstance(facets, dict) and facets.keys() == set(FACETS) and all(_whole(v, 4) for v in facets.values())
    if not sound or found.get("stance") not in STANCES or not (regulation is None or _whole(regulation, 10)):
        return None
    nothing = facets["affect_present"] <= 1 and not facets["corner_cutting"] and not facets["invalidation"]
    if regulation is None and not nothing:
        return None
    quotes = found.get("evidence") if isinstance(found.get("evidence"), list) else []
    evidence = [quote for quote in quotes if isinstance(quote, str) and quote in text]
    facets = {facet: facets[facet] for facet in FACETS}
    return {"stance": found["stance"], "facets": facets, "regulation": regulation, "evidence": evidence}


def _whole(value: Any, greatest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= greatest


def add_label(parser: argparse.ArgumentParser) -> None:
    """The options of `curate label`."""
    parser.add_argument("input", type=Path, help='JSONL with "id" and "text"')
    parser.add_argument(
        "--out", type=Path, required=True, help="JSONL to append labels to; a stopped run goes on there"
    )
    parser.add_argument("--base-url", required=True, help="of an OpenAI-compatible server (http://localhost:8000/v1)")
    parser.add_argument("--model", required=True, help="the server's name of the teacher")
    parser.add_argument("--concurrency", type=int, default=1, help="requests in flight (default: 1)")
    parser.set_defaults(run=label_command)


def label_command(arguments: argparse.Namespace) -> None:
    """Runs `curate label`; the key is read from OPENAI_API_KEY."""
    key = os.environ.get("OPENAI_API_KEY")
    options = (arguments.input, arguments.out, arguments.base_url, arguments.model)
    count, failed = label(*options, key, arguments.concurrency)
    print(f"{count} passages labelled by {arguments.model}: {arguments.out}")
    if failed:
        shown = ", ".join(map(str, failed[:5]))
        print(f"{len(failed)} have no usable answer after {ATTEMPTS} attempts ({shown}); run the same command again")
