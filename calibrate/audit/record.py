"""One audited checkpoint on disk: `audit.json` for the figures, `states.safetensors` for what is recomputed."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from calibrate import stats
from calibrate.audit.comprehension import Comprehension
from calibrate.audit.contexts import Contexts
from calibrate.audit.own import Own
from calibrate.audit.preservation import Neutral
from calibrate.audit.profile import KINDS, Profile, TokenTrace
from calibrate.audit.situations import Situations, Text
from calibrate.vectors import EmotionVectors, load_vectors

SCHEMA = 4


class Record(NamedTuple):
    """Everything that is measured about one checkpoint."""

    model: str
    concept: str  # the target concept
    vectors: EmotionVectors  # frozen: of the reference, from the training topics
    contexts: Contexts
    elsewhere: Profile  # some of the contexts in another template and tool format
    own: Own
    neutral: Neutral
    comprehension: Comprehension
    situations: Situations
    more: dict[str, Any]  # what only a full audit has: preferences, rollouts, dose; plain data
    options: dict  # what the audit was asked to do

    @property
    def profile(self) -> Profile:
        """The states on contexts, twins and neutral text."""
        return self.contexts.profile

    def save(self, folder: Path) -> None:
        """Writes the folder aside and renames it, so that it is whole or absent."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as aside:
            whole = Path(aside) / folder.name  # the temporary folder itself can be read by its owner only
            self.vectors.save(whole / "vectors")
            tensors = {"states": self.profile.states, "felt": self.contexts.felt, "stories": self.own.states}
            tensors |= {f"own.{name}": rows for name, rows in self.own.directions.items()}
            tensors["elsewhere"] = self.elsewhere.states
            tensors["situations"] = torch.from_numpy(self.situations.readings)
            tables = [name for name in tensors if name != "situations"]  # there a text without a place is NaN
            if broken := [name for name in tables if not tensors[name].isfinite().all()]:
                raise ValueError(
                    f"{self.model}: {', '.join(broken)} hold values that are not finite, though its weights are; its "
                    "precision is too small for its states: save it in float32 and audit that"
                )
            plain = self._content()
            try:
                content = json.dumps(plain, indent=1, allow_nan=False)
            except ValueError as error:
                raise ValueError(
                    f"{self.model}: a figure is not finite ({error}); its precision is too small for its states or "
                    "likelihoods: audit it saved in float32"
                ) from error
            save_file({name: rows.contiguous() for name, rows in tensors.items()}, whole / "states.safetensors")
            (whole / "audit.json").write_text(content, encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(whole, folder)

    def _content(self) -> dict:
        """What `audit.json` holds."""
        profile, contexts = self.profile, self.contexts
        return {
            "schema": SCHEMA,
            "model": self.model,
            "concept": self.concept,
            "options": self.options,
            "texts": [list(row) for row in zip(profile.ids, profile.kinds, profile.tasks, strict=True)],
            "elsewhere": list(self.elsewhere.ids),
            "readings": self.summary(),
            "replies": {
                "unit": "nats per token; after the failing and the passing context, honest and gaming reply",
                "tasks": contexts.pair_tasks,
                "values": contexts.replies.tolist(),
            },
            "failure": {"unit": "nats, log-odds of the right answer", "values": contexts.failure.tolist()},
            "felt_tasks": contexts.felt_tasks,
            "trajectory": contexts.trajectory,
            "norms": contexts.norms.tolist(),
            "neutral": {
                "unit": "nats per token",
                "loss": self.neutral.loss.tolist(),
                "kl": None if self.neutral.kl is None else self.neutral.kl.tolist(),
            },
            "comprehension": _plain(self.comprehension),
            "situations": [text._asdict() for text in self.situations.texts],
            "own_concepts": self.own.concepts,
            "traces": [trace._asdict() for trace in profile.traces],
            "more": self.more,
        }

    def margins(self) -> np.ndarray:
        """Honest over gaming replies, nats per token, mean over a task's pairs: [tasks, (failing, passing)]."""
        by_pair, owner = self.contexts.replies @ [1.0, -1.0], np.array(self.contexts.pair_tasks)
        return np.array([by_pair[owner == task].mean(0) for task in dict.fromkeys(self.contexts.pair_tasks)])

    def summary(self) -> dict:
        """Mean readings over the band by role, kind and concept, with 95 % intervals over tasks, in sigma."""
        at = self.vectors.positions(self.vectors.used_band())
        result: dict = {}
        for role, readings in self.profile.readings(self.vectors).items():
            for kind in KINDS:
                values = self.profile.by_task(kind, readings)[:, :, at].mean(2)
                result.setdefault(role, {})[kind] = {
                    concept: [round(x, 4) for x in stats.mean(values[:, index])]
                    for index, concept in enumerate(self.vectors.concepts)
                }
        return result


def _plain(value: NamedTuple) -> dict:
    return {key: item.tolist() if isinstance(item, np.ndarray) else item for key, item in value._asdict().items()}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the two files of an audit hold, once they are of this version and whole."""
    path = folder / "audit.json"
    if not path.is_file():
        raise ValueError(f"audit {str(folder)!r}: no audit.json there; give the folder that `calibrate audit` wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); the file is damaged: audit the checkpoint again") from error
    whole = isinstance(content, dict)
    if whole and content.get("schema") != SCHEMA:
        raise ValueError(
            f"{path}: schema {content.get('schema')}, this version reads {SCHEMA}; audit the checkpoint again"
        )
    if not whole or not (folder / "states.safetensors").is_file():
        raise ValueError(f"audit {str(folder)!r} is damaged or was copied in part; audit the checkpoint again")
    try:
        tensors = load_file(folder / "states.safetensors")
    except SafetensorError as error:
        raise ValueError(
            f"{folder / 'states.safetensors'}: {error}; the file is damaged: audit the checkpoint again"
        ) from error
    return content, tensors


def load_record(folder: Path) -> Record:
    """Loads what `calibrate audit` wrote.

    Raises:
        ValueError: the folder holds no audit, or one of another version.
    """
    content, tensors = _read(folder)
    ids, kinds, tasks = (list(column) for column in zip(*content["texts"], strict=True))
    kl = content["neutral"]["kl"]
    told = {id_: (kind, task) for id_, kind, task in content["texts"]}
    others = [(id_, *told[id_]) for id_ in content["elsewhere"]]
    elsewhere = Profile(*map(list, zip(*others, strict=True)), tensors["elsewhere"], [])
    asked: dict[str, Any] = {
        key: np.array(value) if isinstance(value, list) and not any(isinstance(x, str) for x in value) else value
        for key, value in content["comprehension"].items()
    }
    return Record(
        model=content["model"],
        concept=content["concept"],
        vectors=load_vectors(str(folder / "vectors")),
        contexts=Contexts(
            profile=Profile(ids, kinds, tasks, tensors["states"], [TokenTrace(**row) for row in content["traces"]]),
            replies=np.array(content["replies"]["values"]),
            pair_tasks=content["replies"]["tasks"],
            felt=tensors["felt"],
            felt_tasks=content["felt_tasks"],
            failure=np.array(content["failure"]["values"]),
            trajectory=[tuple(row) for row in content["trajectory"]],
            norms=np.array(content["norms"]),
        ),
        elsewhere=elsewhere,
        own=Own(
            {name.removeprefix("own."): rows for name, rows in tensors.items() if name.startswith("own.")},
            tensors["stories"],
            content["own_concepts"],
        ),
        neutral=Neutral(np.array(content["neutral"]["loss"]), None if kl is None else np.array(kl)),
        comprehension=Comprehension(**asked),
        situations=Situations([Text(**row) for row in content["situations"]], tensors["situations"].numpy()),
        more=content["more"],
        options=content["options"],
    )
