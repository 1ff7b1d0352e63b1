"""What emotional regulation is made of, and the labelled passages that say so."""

# ruff: noqa: T201 -- run as a script it prints what a file of labels holds

import json
import sys
from pathlib import Path
from typing import Any

FACETS = ("affect_present", "distress", "hostility")
ADAPTIVE = ("acknowledges_feeling", "reappraisal_perspective", "acceptance", "problem_solving", "support_seeking")
ADAPTIVE += ("composed_empathy", "integrity_under_pressure")
MALADAPTIVE = ("rumination", "catastrophising", "despair", "panic", "blame_rage", "invalidation", "corner_cutting")
FACETS += ADAPTIVE + MALADAPTIVE
STANCES = ("modelled", "described", "criticised")
HIGH = ("grief_processed", "pressure_composed", "anger_constructive", "fear_faced", "support_given", "joy_grounded")
LOW = ("distress_dysregulated", "toxic_positivity", "corner_cutting", "stoic_suppression", "blame_rage")
CELLS = (*HIGH, *LOW, "mixed", "neutral", "described")
GENRES = ("memoir", "diary", "letter", "fiction", "dialogue", "forum", "advice", "work_message", "incident_log")
GENRES += ("assistant_chat", "agent_log", "news", "textbook", "speech", "interview", "how_to", "review", "sports")
WORDS = (100, 250)
FIELDS = {"id", "writer", "text", "genre", "event", "cell", "tone", "stance", "facets", "regulation"}


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with one labelled passage, by the rules of `labels/GUIDE.md`."""
    if missing := FIELDS - row.keys():
        return [f"missing {sorted(missing)}"]
    found, facets, regulation = [], row["facets"], row["regulation"]
    if unknown := row.keys() - FIELDS - {"pair"}:
        found.append(f"unknown fields {sorted(unknown)}")
    if not WORDS[0] <= (words := len(row["text"].split())) <= WORDS[1]:
        found.append(f"{words} words; {WORDS[0]} to {WORDS[1]} are allowed")
    for field, allowed in (("genre", GENRES), ("cell", CELLS), ("stance", STANCES), ("tone", (-2, -1, 0, 1, 2))):
        if row[field] not in allowed:
            found.append(f"{field} {row[field]!r} is none of {', '.join(map(str, allowed))}")
    if facets.keys() != set(FACETS) or not all(value in range(5) for value in facets.values()):
        return [*found, f"facets must be these, each 0 to 4: {', '.join(FACETS)}"]
    nothing = facets["affect_present"] <= 1 and not facets["corner_cutting"] and not facets["invalidation"]
    if regulation is None and not nothing:
        found.append("regulation is null, and there is something to regulate")
    if regulation is not None and regulation not in range(11):
        found.append(f"regulation {regulation!r} is neither null nor 0 to 10")
    low, high = 6 if row["cell"] in HIGH else 0, 4 if row["cell"] in LOW else 10
    if row["cell"] in HIGH + LOW and (regulation is None or not low <= regulation <= high):
        found.append(f"regulation {regulation!r} in the cell {row['cell']}: {low} to {high}")
    return found


def load(path: Path) -> list[dict[str, Any]]:
    """The labelled passages of a JSONL file.

    Raises:
        ValueError: a row breaks the guide; names file and line.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if found := faults(row):
            raise ValueError(f"{path}, line {number}: {'; '.join(found)}")
        rows.append(row)
    return rows


def _check(path: Path) -> None:
    """Prints what a file of labels holds, and where two passages share eight words in a row."""
    from collections import Counter

    rows = load(path)
    for field in ("cell", "genre", "stance", "tone"):
        print(field, dict(Counter(row[field] for row in rows).most_common()))
    pairs = Counter(row["pair"] for row in rows if "pair" in row)
    print("regulation", dict(sorted(Counter(str(row["regulation"]) for row in rows).items())))
    print(len(rows), "rows,", len(pairs), "pairs;", "not two rows:", [k for k, n in pairs.items() if n != 2])
    print("repeated ids", [key for key, n in Counter(row["id"] for row in rows).items() if n > 1])
    owners: dict[str, str] = {}
    for row in rows:
        words = row["text"].lower().split()
        for start in range(len(words) - 7):
            eight = " ".join(words[start : start + 8])
            if owners.setdefault(eight, row["id"]) != row["id"]:
                print("shared by", owners[eight], "and", row["id"], "-", eight)


if __name__ == "__main__":
    _check(Path(sys.argv[1]))
