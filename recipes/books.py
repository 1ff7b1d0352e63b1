"""
Plain-text books of Project Gutenberg -> a pool of passages, one parquet file with `id`, `text` and `book`.

```bash
python recipes/books.py 1260.txt 766.txt --out runs/pool/pool.parquet
```

A passage is whole paragraphs of one book, 150 to 300 words where paragraphs allow it. What stands before and after the
marks that Project Gutenberg puts around its texts is left out, so that no licence text is trained on. The 12
books of the figures in `recipes/`, all in the public domain in the USA, are listed in `docs/curation.md`.
"""

import argparse
import os
import re
import sys
from pathlib import Path

LEAST, MOST = 150, 300  # words of a passage
START = re.compile(r"\*\*\* ?START OF.*?\*\*\*", re.DOTALL)
END = re.compile(r"\*\*\* ?END OF|^End of (the |this )?Project Gutenberg", re.MULTILINE | re.IGNORECASE)


def body(text: str, name: str) -> str:
    """The book itself.

    Raises:
        ValueError: the file has no start mark or no end mark.
    """
    start = START.search(text)
    end = END.search(text, start.end()) if start else None
    if not start or not end:
        raise ValueError(f"{name}: no `*** START OF` and `*** END OF` marks of Project Gutenberg; give its plain text")
    return text[start.end() : end.start()]


def passages(text: str) -> list[str]:
    """Runs of whole paragraphs: each goes on until it has 150 words; one longer than 300 words alone is left out."""
    found, current = [], []
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        words = paragraph.split()
        if not words:
            continue
        if sum(map(len, current)) + len(words) > MOST:
            current = []
        if len(words) <= MOST:
            current.append(words)
        if sum(map(len, current)) >= LEAST:
            found.append("\n\n".join(" ".join(part) for part in current))
            current = []
    return found


def read(path: Path) -> str:
    """Text of a file in UTF-8 or, as Gutenberg's older files are, in Latin-1."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def main() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("books", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    columns: dict[str, list[str]] = {"id": [], "text": [], "book": []}
    for path in arguments.books:
        try:
            found = passages(body(read(path), str(path)))
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        columns["id"] += [f"{path.stem}/{number:05}" for number in range(len(found))]
        columns["text"] += found
        columns["book"] += [path.stem] * len(found)
        print(f"{path.stem}: {len(found):,} passages")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    aside = arguments.out.with_suffix(".partial")
    pq.write_table(pa.table(columns), aside)
    os.replace(aside, arguments.out)
    print(f"{arguments.out}: {len(columns['id']):,} passages, {sum(len(t.split()) for t in columns['text']):,} words")


if __name__ == "__main__":
    main()
