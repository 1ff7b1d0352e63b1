"""The emotional profile: states at the turn header and over the reply, on failing contexts, twins and neutral text."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from calibrate.vectors import EmotionVectors

ROLES = ("header", "reply")
KINDS = ("failing", "passing", "neutral")


class TokenTrace(NamedTuple):
    """Per-token readings of one transcript, in sigma of neutral tokens, mean over the band."""

    id: str
    text: str
    offsets: list[tuple[int, int]]
    roles: list[str]
    readings: dict[str, list[float]]  # by concept, the target first


class Profile(NamedTuple):
    """Mean states of every audited text; all readings of it follow by arithmetic."""

    ids: list[str]
    kinds: list[str]  # failing, passing or neutral
    tasks: list[str]
    states: Tensor  # [texts, header and reply, layers, hidden], float32
    traces: list[TokenTrace]

    def readings(self, vectors: EmotionVectors, directions: Tensor | None = None) -> dict[str, np.ndarray]:
        """Readings in sigma by role, [texts, concepts, layers], of these or other directions on the vectors' scale."""
        return {
            role: vectors.readings(self.states[:, position], role, directions).numpy()
            for position, role in enumerate(ROLES)
        }

    def rows(self, kind: str) -> list[int]:
        """Rows of one kind, ordered by task, so that twins line up."""
        return sorted((i for i, k in enumerate(self.kinds) if k == kind), key=lambda i: self.tasks[i])

    def by_task(self, kind: str, values: np.ndarray) -> np.ndarray:
        """Values of every text -> means over the contexts of each task, [tasks, ...], in the order of `rows`."""
        rows = self.rows(kind)
        tasks = np.array([self.tasks[row] for row in rows])
        return np.stack([values[rows][tasks == task].mean(0) for task in dict.fromkeys(tasks.tolist())])

    def count_tasks(self) -> int:
        """Tasks whose failing contexts were read."""
        return len({self.tasks[row] for row in self.rows("failing")})

    def only(self, ids: set[str]) -> "Profile":
        """The texts of these ids, without traces."""
        rows = [i for i, id_ in enumerate(self.ids) if id_ in ids]
        return Profile(
            *([column[i] for i in rows] for column in (self.ids, self.kinds, self.tasks)), self.states[rows], []
        )
