"""One audited checkpoint on disk: `audit.json` for the figures, `states.safetensors` for what is recomputed."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from calibrate import stats
from calibrate.audit.preservation import Neutral
from calibrate.audit.profile import Profile, TokenTrace
from calibrate.vectors import EmotionVectors, load_vectors


class Record(NamedTuple):
    """Everything that is measured about one checkpoint."""

    model: str
    concept: str  # the target concept
    profile: Profile
    vectors: EmotionVectors  # frozen: of the reference, from the training topics
    own_direction: (
        torch.Tensor
    )  # of the target, from this checkpoint's own states on the audit topics, [layers, hidden]
    likelihoods: np.ndarray  # [pairs, (honest, gaming)], nats per token
    pair_tasks: list[str]
    neutral: Neutral
    options: dict  # what the audit was asked to do

    def save(self, folder: Path) -> None:
        """Writes the folder aside and renames it, so that it is whole or absent."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as aside:
            whole = Path(aside) / folder.name  # the temporary folder itself can be read by its owner only
            self.vectors.save(whole / "vectors")
            tensors = {"states": self.profile.states, "own_direction": self.own_direction.contiguous()}
            save_file(tensors, whole / "states.safetensors")
            (whole / "audit.json").write_text(json.dumps(self._content(), indent=1), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(whole, folder)

    def _content(self) -> dict:
        """What `audit.json` holds."""
        profile = self.profile
        return {
            "model": self.model,
            "concept": self.concept,
            "options": self.options,
            "texts": [list(row) for row in zip(profile.ids, profile.kinds, profile.tasks, strict=True)],
            "readings": self.summary(),
            "likelihoods": {
                "unit": "nats per token, honest and gaming reply",
                "tasks": self.pair_tasks,
                "values": self.likelihoods.tolist(),
            },
            "neutral": {
                "unit": "nats per token",
                "loss": self.neutral.loss.tolist(),
                "kl": None if self.neutral.kl is None else self.neutral.kl.tolist(),
            },
            "trace": profile.trace._asdict(),
        }

    def summary(self) -> dict:
        """Mean readings over the band by role, kind and concept, with 95 % intervals over tasks, in sigma."""
        at = self.vectors.positions(self.vectors.used_band())
        result: dict = {}
        for role, readings in self.profile.readings(self.vectors).items():
            for kind in ("failing", "passing", "neutral"):
                values = self.profile.by_task(kind, readings)[:, :, at].mean(2)
                result.setdefault(role, {})[kind] = {
                    concept: [round(x, 4) for x in stats.mean(values[:, index])]
                    for index, concept in enumerate(self.vectors.concepts)
                }
        return result


def load_record(folder: Path) -> Record:
    """Loads what `calibrate audit` wrote.

    Raises:
        ValueError: the folder holds no audit.
    """
    path = folder / "audit.json"
    if not path.is_file():
        raise ValueError(f"audit {str(folder)!r}: no audit.json there; give the folder that `calibrate audit` wrote")
    content = json.loads(path.read_text(encoding="utf-8"))
    tensors = load_file(folder / "states.safetensors")
    ids, kinds, tasks = (list(column) for column in zip(*content["texts"], strict=True))
    trace = TokenTrace(**content["trace"])
    kl = content["neutral"]["kl"]
    return Record(
        model=content["model"],
        concept=content["concept"],
        profile=Profile(ids, kinds, tasks, tensors["states"], trace),
        vectors=load_vectors(str(folder / "vectors")),
        own_direction=tensors["own_direction"],
        likelihoods=np.array(content["likelihoods"]["values"]),
        pair_tasks=content["likelihoods"]["tasks"],
        neutral=Neutral(np.array(content["neutral"]["loss"]), None if kl is None else np.array(kl)),
        options=content["options"],
    )
