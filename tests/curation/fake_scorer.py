"""A scorer that reads its scores from a digest of the text, and dies, waits or fails where a text says so."""

import hashlib
import os
import re
import signal
import time
from pathlib import Path

import pyarrow as pa

from data_curation.facets import FACETS

TYPES = dict.fromkeys(("regulation", "regulation_low", "regulation_high", *FACETS), pa.float32())
TYPES |= {"stance": pa.string(), "arc": pa.float32(), "tier": pa.int8()}
WINDOW = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("regulation", pa.float32())])
TYPES |= {"windows": pa.list_(pa.struct([*WINDOW, pa.field("affect_present", pa.float32())]))}


class FakeScorer:
    first = second = None

    def __init__(self, source: str):
        self.hash = hashlib.sha256(source.encode()).hexdigest()[:16]

    def score(self, texts: list[str]) -> list[dict]:
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> dict:
        if (found := re.search(r"DIE ONCE (\S+)", text)) and (mark := Path(found[1])).exists():
            mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if "DIE ALWAYS" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if "UNFORESEEN" in text:
            raise RuntimeError("a bug of the scorer")
        if found := re.search(r"WAIT (\S+)", text):
            time.sleep(float(found[1]))
        digest = hashlib.sha256(self.hash.encode() + text.encode()).digest()
        values = {facet: digest[i] / 255 for i, facet in enumerate(FACETS)}
        regulation = None if "NEUTRAL" in text else digest[30] / 255
        if found := re.search(r"SCORE (\S+)", text):
            regulation = float(found[1])
        low, high = (None, None) if regulation is None else (max(0, regulation - 0.02), min(1, regulation + 0.02))
        window = {"start": 0, "end": len(text), "regulation": regulation, "affect_present": values["affect_present"]}
        row = {"regulation": regulation, "regulation_low": low, "regulation_high": high, **values}
        return row | {"stance": "modelled", "arc": None, "tier": 1, "windows": [window]}


def load(source: str = "default", tier: str = "auto", model: str | None = None) -> FakeScorer:
    return FakeScorer(source)
