"""`EmotionVectors`: the saved directions of all concepts, the reference's neutral states, and what they read."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple, Self

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

logger = logging.getLogger(__name__)

LENS_SHOWN = 8  # concepts whose logit lens stands in the card; the shipped stories begin with the target and `calm`
POOLINGS = ("token", "header", "reply", "text")
SHIPPED = Path(__file__).parent / "default_vectors"  # of the default model; `recipe` says how they were made


class LayerChoice(NamedTuple):
    """Where emotions are read: layers, why in words, and the held-out accuracy of every layer of the model."""

    layers: list[int]
    reason: str
    accuracy: list[float]


def two_thirds(layers: list[int], depth: int) -> list[int]:
    """Those of `layers` at 60 to 70 % of depth (the study's two thirds), or where there is none the nearest one."""
    around = [layer for layer in layers if 0.6 <= (layer + 1) / depth <= 0.7]
    return around or [min(layers, key=lambda layer: abs((layer + 1) / depth - 2 / 3))]


class EmotionVectors(nn.Module, PyTorchModelHubMixin, library_name="calibrate", tags=["emotion-vectors"]):
    """Unit directions of every concept at every layer, and neutral states of the reference to centre and scale them.

    A reading is `<h - mu, direction> / sigma` in sigma: mu and sigma (standard deviation along the direction) come
    from neutral text in the reference model, for each layer and pooling (token, turn header, reply mean, text mean).

    The arguments are the content of `config.json`; the tensors are buffers in `model.safetensors`:
    `directions` [concepts, layers, hidden] and `neutral_POOLING` [samples, layers, hidden].
    """

    directions: Tensor

    def __init__(
        self,
        concepts: list[str],
        layers: list[int],
        hidden_size: int,
        depth: int,
        samples: dict[str, int],
        model: str,
        weight_hash: str,
        recipe: dict,
        band: list[int] | None = None,
        band_reason: str = "",
        band_search: dict | None = None,
        model_revision: str | None = None,
        layer_choice: list | None = None,
        checks: dict | None = None,
    ):
        super().__init__()
        self.concepts, self.layers, self.hidden_size, self.depth = concepts, layers, hidden_size, depth
        self.model, self.weight_hash, self.model_revision, self.recipe = model, weight_hash, model_revision, recipe
        self.layer_choice = LayerChoice(*layer_choice) if layer_choice else None
        self.checks = checks  # what `calibrate extract --check` found; None: not run
        self.set_band(band, band_reason, band_search)  # band None: the search found no layers, premise not met
        self.register_buffer("directions", torch.zeros(len(concepts), len(layers), hidden_size))
        for pooling in POOLINGS:
            self.register_buffer(f"neutral_{pooling}", torch.zeros(samples[pooling], len(layers), hidden_size))

    def set_band(self, band: list[int] | None, reason: str, search: dict | None = None) -> None:
        """Keeps the outcome of the band search: layers, reason in words, and the figures of every layer."""
        self.band, self.band_reason, self.band_search = band, reason, search

    def neutral(self, pooling: str) -> Tensor:
        """Neutral states of the reference, [samples, layers, hidden]."""
        return self.get_buffer(f"neutral_{pooling}")

    def neutral_at(self, pooling: str, layers: list[int]) -> Tensor:
        """Neutral states at `layers`, [samples, layers, hidden]; raises ValueError where one is not stored."""
        return self.neutral(pooling)[:, self.positions(layers)]

    def used_band(self) -> list[int]:
        """What training presses and audits judge: the band, or where the search found none the reading layers."""
        return self.band or self.reading_layers()

    def reading_layers(self) -> list[int]:
        """Where texts are read: the layer choice as far as it is stored; else the study's two thirds of depth."""
        chosen = [layer for layer in self.layer_choice.layers if layer in self.layers] if self.layer_choice else []
        return chosen or two_thirds(self.layers, self.depth)

    def scale(self, pooling: str, directions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mu [layers, hidden], sigma [concepts, layers]) of a pooling, for these or any other directions."""
        neutral = self.neutral(pooling).double()
        directions = self.directions if directions is None else directions
        along = torch.einsum("slh,clh->scl", neutral - neutral.mean(0), directions.double())
        return neutral.mean(0), along.std(0)

    def readings(self, states: Tensor, pooling: str, directions: Tensor | None = None) -> Tensor:
        """Readings in sigma, float64 [..., concepts, layers], of states [..., layers, hidden] at all stored layers."""
        directions = self.directions if directions is None else directions
        mu, sigma = self.scale(pooling, directions)
        return torch.einsum("...lh,clh->...cl", states.double() - mu, directions.double()) / sigma

    def positions(self, layers: list[int]) -> list[int]:
        """Where `layers` stand among the stored ones.

        Raises:
            ValueError: one of them is not stored.
        """
        if missing := [layer for layer in layers if layer not in self.layers]:
            raise ValueError(
                f"layers {missing} are out of range; these vectors hold layers {self.layers[0]} to {self.layers[-1]}"
            )
        return [self.layers.index(layer) for layer in layers]

    def index(self, concept: str) -> int:
        """The row of a concept.

        Raises:
            ValueError: the vectors lack it.
        """
        if concept not in self.concepts:
            raise ValueError(f"these vectors have no concept {concept!r}; they have {', '.join(self.concepts)}")
        return self.concepts.index(concept)

    def check(self, hidden_size: int, depth: int, weight_hash: str, name: str) -> None:
        """Refuses a model of another shape and warns of other weights (another revision, or full fine-tuning).

        Raises:
            ValueError: the model called `name` has another width or depth than the vectors' own.
        """
        if (hidden_size, depth) != (self.hidden_size, self.depth):
            raise ValueError(
                f"the vectors come from {self.model} (width {self.hidden_size}, {self.depth} layers); model {name!r} "
                f"has width {hidden_size} and {depth} layers; extract vectors from it with `calibrate extract {name}`"
            )
        if weight_hash != self.weight_hash:
            logger.warning(
                "the vectors come from %s (weights %s, revision %s); model %r has other base weights (%s): another "
                "revision, or trained in full. Readings keep the unit of the vectors' own model.",
                self.model, self.weight_hash, self.model_revision, name, weight_hash,
            )  # fmt: skip

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes config.json, model.safetensors and the card aside and renames: the folder is whole or absent.

        `dtype` is that of the file; in memory vectors are float32.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as aside:
            whole = Path(aside) / folder.name  # the temporary folder itself can be read by its owner only
            whole.mkdir()
            self.to(dtype).save_pretrained(whole)
            self.float()
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(whole, folder)

    def _save_pretrained(self, save_directory: Path) -> None:
        """What the mixin calls, to push too: its own config is that of construction, before `set_band` and checks."""
        super()._save_pretrained(save_directory)
        config = json.dumps(self.config(), sort_keys=True, indent=2)
        (save_directory / "config.json").write_text(config, encoding="utf-8")
        self.generate_model_card().save(save_directory / "README.md")

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """The card as the mixin wants it; what it passes for its own template plays no part."""
        return ModelCard(self.card())

    @classmethod
    def _from_pretrained(
        cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, **arguments
    ) -> Self:
        """What the mixin calls: strictly from safetensors, where its own falls back to a pickle and to zeros."""
        file = Path(model_id) / "model.safetensors"
        if not Path(model_id).is_dir():
            options = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download, "token": token}
            file = hf_hub_download(model_id, file.name, local_files_only=local_files_only, **options)
        vectors = cls(**arguments)
        load_model(vectors, file)
        return vectors.eval()

    def config(self) -> dict:
        """What `config.json` holds: the arguments that build these vectors, without the tensors."""
        names = ("concepts", "layers", "hidden_size", "depth", "model", "weight_hash", "model_revision", "recipe")
        names += ("band", "band_reason", "band_search", "layer_choice", "checks")
        samples = {pooling: len(self.neutral(pooling)) for pooling in POOLINGS}
        return {name: getattr(self, name) for name in names} | {"samples": samples}

    def content_hash(self) -> str:
        """A short hash of the directions and of the neutral states."""
        digest = hashlib.sha256()
        for name, tensor in self.named_buffers():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def card(self) -> str:
        """The model card: what the vectors are, how they were made and what the checks found."""
        found = f"{self.band[0]} to {self.band[-1]}" if self.band else "none"
        recipe = [(key, json.dumps(value)) for key, value in self.recipe.items()]
        checks = check_rows(self.checks or {}, self.concepts)
        tables = ""
        for name, rows in (("check", checks), ("setting", recipe)):
            lines = [" | ".join(("", key, value.replace("|", "\\|"), "")).strip() for key, value in rows]
            tables += "\n".join(["", f"| {name} | value |", "|---|---|", *lines, ""]) if rows else ""
        return (
            "---\nlibrary_name: calibrate\ntags: [emotion-vectors]\n---\n\n# Emotion vectors\n\n"
            f"Directions of {len(self.concepts)} emotion concepts in the residual stream of {self.model} (weights "
            f"{self.weight_hash}), layers {self.layers[0]} to {self.layers[-1]} of {self.depth} (layer i is the "
            f"output of block i, counted from 0). Read at layers {', '.join(map(str, self.reading_layers()))}. "
            f"{self.layer_choice.reason if self.layer_choice else ''}\n\nBand for training: {found}. "
            f"{self.band_reason}\n\n"
            "They say how far a text moves the model along a direction that emotion stories define. They are no "
            "evidence of experience, and not by themselves evidence about behaviour.\n\n"
            f"Concepts: {', '.join(self.concepts)}.\n{tables}"
        )


def check_rows(checks: dict, concepts: list[str]) -> list[tuple[str, str]]:
    """(name, value) of every check, for a table; of the concepts' own figures as many as one can read.

    Split-half reliability of the lowest, the median and the highest concepts; each ladder; the logit lens of the first
    `LENS_SHOWN` of `concepts`. `config.json` holds all of them.
    """
    rows = [(key, json.dumps(value)) for key, value in checks.items() if not isinstance(value, dict)]
    ranked = sorted(checks.get("split-half reliability", {}).items(), key=lambda row: row[1])
    middle = len(ranked) // 2
    parts = {"lowest": ranked[:3], "median": ranked[middle : middle + 1], "highest": ranked[-3:]}
    for name, part in parts.items():
        if part:
            rows.append((f"split-half reliability, {name}", ", ".join(f"{concept} {r:.2f}" for concept, r in part)))
    ladders: dict[str, list[str]] = {}
    for name, rho in checks.get("ladders", {}).items():  # `ID CONCEPT up`
        ladder, _, expected = name.partition(" ")
        ladders.setdefault(ladder, []).append(f"{expected} {rho:.2f}")
    rows += [(f"{ladder}: expected, rank correlation", ", ".join(found)) for ladder, found in ladders.items()]
    lens = checks.get("logit lens", {})
    shown = [concept for concept in concepts if concept in lens][:LENS_SHOWN]
    return rows + [(f"logit lens, {concept}", json.dumps(lens[concept], ensure_ascii=False)) for concept in shown]


def load_vectors(folder: str) -> EmotionVectors:
    """Loads vectors from a folder, a Hub id, or those that ship for the default model (`default`).

    Raises:
        ValueError: nothing is there, or something else.
    """
    if folder == "default":
        folder = str(SHIPPED / "train")
    looks_local = Path(folder).exists() or folder.count("/") != 1 or folder.startswith(".")
    if looks_local and not (Path(folder) / "model.safetensors").is_file():
        raise ValueError(
            f"vectors {folder!r}: no model.safetensors there; give the folder that `calibrate extract` wrote, or a "
            f"Hub id"
        )
    try:
        return EmotionVectors.from_pretrained(folder)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"vectors {folder!r} cannot be loaded ({reason}); give the folder that `calibrate extract` wrote, or a "
            "Hub id"
        ) from error
