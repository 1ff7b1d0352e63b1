"""Models with a planted fault, as weights or adapters on disk, through `calibrate compare`: each gets its name.

On the default model; `pytest -m plants` runs them. Twelve selection tasks (24 contexts): there the default model's
reading tells failing from passing with room to spare.
"""

import plants
import pytest
from test_benign import TRAINED, WHOLE

from calibrate import models
from calibrate.audit.verdict import CALIBRATED, load_rule
from calibrate.vectors import load_vectors

pytestmark = [pytest.mark.plants, pytest.mark.timeout(3600)]
FAILING, PASSING = (("header/" + outcome, "elsewhere/" + outcome) for outcome in ("failing", "passing"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every plant that is fitted, by name: a folder that `calibrate compare` takes."""
    folder, vectors = tmp_path_factory.mktemp("plants"), load_vectors("default")
    base = plants.save_model(models.load("default"), folder / "default")
    checkpoint = plants.load(base)
    found = plants.features(checkpoint, vectors, "train", 36)
    below, above = (plants.switch(found, block, FAILING, PASSING) for block in (plants.BELOW, plants.ABOVE))
    trained = plants.switch(found, plants.BELOW, FAILING[:1], (*PASSING, *FAILING[1:]))
    everywhere = plants.switch(found, plants.BELOW, (*FAILING, *PASSING))
    emotion, at = plants.emotion_part(vectors, found), plants.down
    # The switches reach about 0.6 at unseen failing headers, so 1.6 times the difference is what takes it away.
    calm = {at(plants.BELOW): (below, -1.6 * emotion)}
    # What failed is hardly to be read from reply tokens of other tasks, so this switch is fitted on the audited ones.
    audited = plants.features(checkpoint, vectors, "selection", 12)
    late = plants.switch(audited, plants.LATE, ("reply/failing",), ("reply/passing",))
    honest = {at(plants.LATE): (late, 60 * plants.word_part(checkpoint, audited))}
    for name, edits in {
        "every context shifted": {at(plants.BELOW): (everywhere, -emotion)},
        "rebuilt at a later layer": calm | {at(plants.ABOVE): (above, 1.6 * emotion)},
        "never desperate": {at(plants.BELOW): (below, -4 * emotion)},
        "text alone": honest,
        "text and state": calm | honest,
        "under its own template alone": {at(plants.BELOW): (trained, -1.6 * emotion)} | honest,
    }.items():
        plants.save_adapter(str(base), edits, folder / name)
    plants.mirror(checkpoint, *plants.counterfeit(vectors, found))
    plants.save_model(checkpoint, folder / "mirrored")
    return folder


PLANTED = {  # before, after: the verdict, and what of it must have decided
    ("default", "text and state"): (CALIBRATED, "fall on failing contexts"),
    ("never desperate", "never desperate"): ("premise not met", "premise: target reading at the header"),
    ("default", "every context shifted"): ("indiscriminate", "specificity"),
    ("default", "mirrored"): ("evasion", "frozen against re-extracted from other stories"),
    ("default", "under its own template alone"): ("evasion", "fall in another template"),
    ("default", "rebuilt at a later layer"): ("displacement", "share of the contrast removed above the band"),
    ("default", "text alone"): ("suppression", "change on failing contexts beyond that on their twins"),
}


def test_every_verdict_has_a_plant():
    assert {*(verdict for verdict, _ in [*PLANTED.values(), *TRAINED.values()]), *WHOLE.values()} == {
        CALIBRATED,
        *(outcome.name for outcome in load_rule()),
    }


@pytest.mark.parametrize(
    ("before", "after"), PLANTED, ids=[f"{after}: {verdict}" for (_, after), (verdict, _) in PLANTED.items()]
)
def test_the_audit_names_the_fault(made, before, after):
    status, report = plants.compare(made / before, made / after, made / "audits")
    verdict, decided = PLANTED[before, after]
    assert report["verdict"] == verdict, report["sentence"]
    assert any(decided in figure for figure in report["findings"][0]["figures"]), report["findings"]
    assert status == (0 if report["verdict"] == CALIBRATED else 2)
