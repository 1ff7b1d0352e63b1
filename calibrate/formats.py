"""Directions in other tools' formats: GGUF control vectors, persona-vector tensors, rows of an SAE decoder."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calibrate.vectors import EmotionVectors


def export_gguf(vectors: EmotionVectors, concept: str, path: Path, hint: str) -> list[int]:
    """One concept as a llama.cpp control vector; returns its layers.

    `direction.N` is added to the output of block N, which is our layer N. Each is the unit direction times the median
    norm of neutral tokens at that layer, so that a scale of 0.05 adds 5 % of the residual norm there. llama.cpp adds
    those of all layers, and what is added stays in the stream: for that dose at one layer alone give it
    `--control-vector-layer-range N N`. It has no place for layer 0.

    Args:
        hint: the model's architecture in llama.cpp, such as `llama`.

    Raises:
        ValueError: the vectors lack the concept, or hold layer 0 alone.
    """
    from gguf import GGUFWriter

    row = vectors.index(concept)
    layers = [layer for layer in vectors.layers if layer > 0]
    if not layers:
        raise ValueError(
            "a GGUF control vector has no place for layer 0, the only one that these vectors hold; extract others "
            "with `--layers`"
        )
    norms = vectors.neutral("token").norm(dim=-1).median(0).values
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    writer = GGUFWriter(aside, "controlvector")
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(layers))
    writer.add_string("general.name", f"{concept}: one unit of scale is the residual norm at each layer")
    for layer, position in zip(layers, vectors.positions(layers), strict=True):
        scaled = vectors.directions[row, position] * norms[position]
        writer.add_tensor(f"direction.{layer}", scaled.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.rename(aside, path)
    return layers


def export_persona(vectors: EmotionVectors, path: Path) -> None:
    """All concepts as persona-vector tensors: one `[layers + 1, hidden]` per concept in a safetensors file.

    Row i + 1 is our layer i (row 0 is the embedding); rows of layers that the vectors do not hold are zero.
    """
    rows = torch.zeros(len(vectors.concepts), vectors.depth + 1, vectors.hidden_size)
    for position, layer in enumerate(vectors.layers):
        rows[:, layer + 1] = vectors.directions[:, position]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(
        {concept: rows[index].contiguous() for index, concept in enumerate(vectors.concepts)},
        aside,
        {"format": "pt", "model": vectors.model, "rows": "row i + 1 is the output of block i, row 0 the embedding"},
    )
    os.rename(aside, path)


def export_folder(vectors: EmotionVectors, layers: list[int], folder: Path, half: bool) -> None:
    """The project's own format with `layers` only, in float16 with `half` (directions keep a cosine of 1 - 1e-7).

    Raises:
        ValueError: a layer is not stored.
    """
    at = vectors.positions(layers)
    config: dict[str, Any] = vectors.config() | {"layers": layers}
    if vectors.band is not None and not set(vectors.band) <= set(layers):
        raise ValueError(f"the band is {vectors.band}; `--layers` {layers} leaves some of it out")
    if vectors.band_search:
        config["band_search"] = {name: [series[i] for i in at] for name, series in vectors.band_search.items()}
    slim = EmotionVectors(**config)
    for name, buffer in slim.named_buffers():
        buffer.copy_(vectors.get_buffer(name)[:, at])
        if half and buffer.abs().max() > torch.finfo(torch.float16).max:
            raise ValueError(f"{name} holds values beyond float16 (massive activations); export without `--half`")
    slim.save(folder, torch.float16 if half else torch.float32)


def load_directions(path: Path, depth: int, hidden: int) -> tuple[list[str], list[int], Tensor]:
    """Persona-vector tensors of a safetensors file: (names, layers, unit directions [names, layers, hidden]).

    Layers at which a tensor is zero are left out, for all of them.

    Raises:
        ValueError: the file is no safetensors file, or a tensor is not [depth + 1, hidden].
    """
    tensors = _tensors(path)
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != (depth + 1, hidden):
            raise ValueError(
                f"{path}: tensor {name!r} has the shape {list(tensor.shape)}; the model needs [layers + 1, hidden] = "
                f"[{depth + 1}, {hidden}]"
            )
    if not tensors:
        raise ValueError(f"{path}: the file holds no tensors; give one [layers + 1, hidden] tensor for each concept")
    rows = torch.stack([tensor[1:].double() for tensor in tensors.values()])
    layers = [layer for layer in range(depth) if (rows[:, layer].norm(dim=-1) > 0).all()]
    if not layers:
        raise ValueError(
            f"{path}: at no layer do all {len(tensors)} tensors hold a direction; all rows after 0 are zero"
        )
    rows = rows[:, layers]
    return list(tensors), layers, (rows / rows.norm(dim=-1, keepdim=True)).float()


def load_sae_rows(path: Path, tensor: str, rows: dict[str, int], hidden: int) -> tuple[list[str], Tensor]:
    """Rows of an SAE decoder [features, hidden] as directions: (names, unit directions [names, 1, hidden]).

    Raises:
        ValueError: no safetensors file, no such tensor, another width, or a row out of range.
    """
    tensors = _tensors(path)
    if tensor not in tensors:
        raise ValueError(f"{path}: no tensor {tensor!r}; it has {', '.join(tensors)}; name it with `--sae-tensor`")
    decoder = tensors[tensor]
    if decoder.ndim != 2 or decoder.shape[1] != hidden:
        raise ValueError(f"{path}: {tensor!r} has the shape {list(decoder.shape)}; it must be [features, {hidden}]")
    for name, row in rows.items():
        if not 0 <= row < len(decoder):
            raise ValueError(
                f"{path}: row {row} of {name!r} is out of range; {tensor!r} has rows 0 to {len(decoder) - 1}"
            )
        if decoder[row].norm() == 0:
            raise ValueError(f"{path}: row {row} of {tensor!r} is zero and has no direction; leave out {name!r}")
    found = torch.stack([decoder[row].double() for row in rows.values()])[:, None]
    return list(rows), (found / found.norm(dim=-1, keepdim=True)).float()


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error}); pickled `.pt` files are not read") from error
