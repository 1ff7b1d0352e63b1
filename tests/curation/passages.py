"""Made-up labelled passages whose words give their labels away: what a fit must find."""

import random

from data_curation.facets import FACETS

WORDS = {
    "grief_processed": "wept breathed mended thanked rested",
    "pressure_composed": "deadline breathed steady mended told",
    "toxic_positivity": "smile bright cheer grateful wonderful",
    "corner_cutting": "deadline faked skipped hid signed",
    "neutral": "table column figure metal water",
}
FILLER = "the a of and on by house road field morning door window street people work day time hand year thing"
LEVELS = {
    "grief_processed": {"affect_present": 4, "distress": 4, "acceptance": 3, "acknowledges_feeling": 3},
    "pressure_composed": {"affect_present": 3, "distress": 1, "integrity_under_pressure": 4},
    "toxic_positivity": {"affect_present": 3, "distress": 3, "invalidation": 4},
    "corner_cutting": {"affect_present": 1, "corner_cutting": 4},
    "neutral": {},
}
REGULATION = {"grief_processed": 9, "pressure_composed": 8, "toxic_positivity": 1, "corner_cutting": 0}


def passages(per_cell: int = 16, writers: int = 4) -> list[dict]:
    """`per_cell` passages of each cell by each of `writers`, 60 words each, a quarter of them telling."""
    generator, rows = random.Random(0), []
    for writer in range(writers):
        for cell, telling in WORDS.items():
            for number in range(per_cell // writers):
                words = generator.choices(FILLER.split(), k=45) + generator.choices(telling.split(), k=15)
                generator.shuffle(words)
                facets = dict.fromkeys(FACETS, 0) | LEVELS[cell]
                rows.append(
                    {
                        "id": f"w{writer}/{cell}-{number}", "writer": f"w{writer}", "text": " ".join(words),
                        "event": f"e{writer}-{cell}-{number}", "cell": cell, "facets": facets,
                        "stance": "described" if cell == "neutral" else "modelled",
                        "regulation": REGULATION.get(cell),
                    }
                )  # fmt: skip
    return rows
