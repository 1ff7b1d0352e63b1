"""Adds directions to the residual stream, or takes them out, while a block of code runs; hooks are counted."""

import contextlib
from collections.abc import Callable, Generator

import torch
from torch import Tensor, nn

from calibrate import models
from calibrate.vectors import EmotionVectors


class Steering:
    """Hooks on blocks that change their output only while asked to.

    Args:
        add: layer -> vector [hidden] that is added at every token.
        remove: layer -> orthonormal rows [directions, hidden] that are projected out at every token.
    """

    def __init__(
        self, model: nn.Module, add: dict[int, Tensor] | None = None, remove: dict[int, Tensor] | None = None
    ):
        self.add, self.remove_rows = add or {}, remove or {}
        modules = models.blocks(model)
        layers = sorted(self.add.keys() | self.remove_rows.keys())
        models.check_layers(layers, len(modules))
        if not layers:
            raise ValueError("no layer to steer at; give at least one")
        self._on, self._fired = False, dict.fromkeys(layers, 0)
        # First in line, so that whoever records the layer sees what the layers above see.
        hooks = [(modules[layer], self._hook(layer)) for layer in layers]
        self._handles = [module.register_forward_hook(hook, prepend=True) for module, hook in hooks]

    def _hook(self, layer: int) -> Callable:
        def change(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
            if not self._on:
                return None
            self._fired[layer] += 1
            states = output[0] if isinstance(output, tuple) else output
            if layer in self.remove_rows:
                rows = self.remove_rows[layer].to(states)
                states = states - states @ rows.T @ rows
            if layer in self.add:
                states = states + self.add[layer].to(states)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return change

    @contextlib.contextmanager
    def active(self) -> Generator[None]:
        """Steers every forward pass inside; at least one pass must run through every hook."""
        self._on, self._fired = True, dict.fromkeys(self._fired, 0)
        try:
            yield
            if still := [layer for layer, count in self._fired.items() if not count]:
                raise RuntimeError(
                    f"the hooks at layers {still} never fired; no pass ran inside, or it was cut before"
                )
        finally:
            self._on = False

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()


def additions(vectors: EmotionVectors, strengths: dict[str, float], layers: list[int]) -> dict[int, Tensor]:
    """Layer -> sum over concepts of strength x median norm of neutral tokens x unit direction.

    Args:
        strengths: concept -> share of the residual norm at the layer; 0.05 is the study's usual dose.

    Raises:
        ValueError: the vectors lack a concept or a layer.
    """
    at = vectors.positions(layers)
    norms = vectors.neutral("token").norm(dim=-1).median(0).values
    rows = {vectors.index(concept): strength for concept, strength in strengths.items()}
    return {
        layer: sum((s * norms[i] * vectors.directions[row, i] for row, s in rows.items()), torch.zeros(()))
        for layer, i in zip(layers, at, strict=True)
    }


def increments(added: dict[int, Tensor]) -> dict[int, Tensor]:
    """What has to be added at each layer so that the sum up to it is that of `added`.

    A vector that is added at one layer stays in the residual stream; adding every layer's own would count it again and
    again (Persona Vectors, arXiv 2507.21509, all-layer steering).
    """
    before = None
    found = {}
    for layer in sorted(added):
        found[layer] = added[layer] if before is None else added[layer] - before
        before = added[layer]
    return found


@contextlib.contextmanager
def steer(
    model: nn.Module, vectors: EmotionVectors, strengths: dict[str, float], layers: list[int] | None = None
) -> Generator[None]:
    """Steers every forward pass inside.

    Example:
        >>> with steer(model, vectors, {"calm": 0.05}):
        ...     model.generate(**inputs)

    Args:
        strengths: concept -> share of the residual norm; negative pushes away from it.
        layers: the vectors' `used_band` by default; at all of them together the stated dose is reached.

    Raises:
        ValueError: the vectors lack a concept or a layer.
    """
    chosen = layers or vectors.used_band()
    steering = Steering(model, increments(additions(vectors, strengths, chosen)))
    try:
        with steering.active():
            yield
    finally:
        steering.detach()
