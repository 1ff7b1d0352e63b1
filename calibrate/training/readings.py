"""Readings of the training contexts, and the reference's states of the same contexts, computed once and cached."""

import contextlib
import hashlib
import json
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import DistributedType
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from calibrate import activations, default_model, models, transcripts
from calibrate.corpora import Context
from calibrate.vectors import EmotionVectors

ROLES = ("header", "reply", "tool")


class Probe(NamedTuple):
    """A tokenised context with its shared reply, and where its units stand; `tool` is the last tool result."""

    ids: list[int]
    header: slice
    reply: slice
    tool: slice = slice(0, 0)


class Units(NamedTuple):
    """Hidden states of each unit: the header's mean first, then the reply's tokens, then the tool result's."""

    states: Tensor  # [rows, units, layers, hidden], float32
    weights: Tensor  # [rows, units], zero where padded; the units of a role sum to the role's weight
    roles: Tensor  # [rows, units], index into `ROLES`


def prepare(tokenizer, contexts: list[Context], reply_tokens: int, tool: bool = False) -> list[Probe]:
    """Tokenises contexts, each followed by the first `reply_tokens` tokens of its reply.

    Args:
        tool: the last tool result has units too; where a context has none, it has none of these.
    """
    probes = []
    for context in contexts:
        encoded = transcripts.encode(tokenizer, context.messages, context.reply)
        header, reply = encoded.last("header"), encoded.last("reply")
        stop = min(reply.stop, reply.start + reply_tokens)
        results = [span for span in encoded.spans if span.role == "tool"] if tool else []
        result = slice(results[-1].start, results[-1].stop) if results else slice(0, 0)
        probes.append(Probe(encoded.ids[:stop], slice(header.start, header.stop), slice(reply.start, stop), result))
    return probes


def gather(states: dict[int, Tensor], first: Tensor, probes: list[Probe], role_weights: dict[str, float]) -> Units:
    """Unit states of recorded states [batch, tokens, hidden] by layer, of the rows that `probes` describe.

    float32 also under bf16 training: readings are differences of large numbers. Gradients pass through.
    """
    hidden = torch.stack(list(states.values()), dim=2)  # [batch, tokens, layers, hidden]
    rows, weights, roles = [], [], []
    for row, probe in enumerate(probes):
        start = int(first[row])
        parts = [hidden[row, start + span.start : start + span.stop].float() for span in probe[1:]]
        parts[0] = parts[0].mean(0, keepdim=True)
        counts = [len(part) for part in parts]
        rows.append(torch.cat(parts))
        shares = [role_weights[role] / max(1, count) for role, count in zip(ROLES, counts, strict=True)]
        weights.append(torch.tensor(shares).repeat_interleave(torch.tensor(counts)))
        roles.append(torch.arange(len(ROLES)).repeat_interleave(torch.tensor(counts)))
    device = hidden.device
    return Units(*(nn.utils.rnn.pad_sequence(part, batch_first=True).to(device) for part in (rows, weights, roles)))


class Reader:
    """Turns unit states into readings in sigma, with the reference's mu and sigma of the unit's pooling.

    Args:
        directions: unit directions [directions, layers, hidden] at `layers`.
        layers: the layers to read, a subset of the vectors' layers.
    """

    def __init__(self, vectors: EmotionVectors, directions: Tensor, layers: list[int]):
        # A copy: a tensor mapped from a file is not aligned in memory, and sums would differ in the last digit.
        self.layers, self.directions = layers, directions.float().clone()
        centres, sigmas = [], []
        for pooling in ("header", "token", "token"):  # by role
            neutral = vectors.neutral_at(pooling, layers).double()
            centres.append(neutral.mean(0))
            along = torch.einsum("slh,dlh->sld", neutral - neutral.mean(0), directions.double())
            sigmas.append(along.std(0))
        self.centres = torch.stack(centres).float()  # [roles, layers, hidden]
        self.sigmas = torch.stack(sigmas).float()  # [roles, layers, directions]

    def __call__(self, units: Units) -> Tensor:
        """Readings [rows, units, layers, directions], sigma; padding reads 0."""
        projected = torch.einsum("rulh,dlh->ruld", self.centred(units), self.directions.to(units.states.device))
        return projected / self.sigmas.to(units.states.device)[units.roles] * (units.weights > 0)[..., None, None]

    def centred(self, units: Units) -> Tensor:
        """Unit states minus the neutral mean of their role, [rows, units, layers, hidden]."""
        return units.states - self.centres.to(units.states.device)[units.roles]


class Reference:
    """The reference's unit states of all probes, on disk, read row by row."""

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")

    def rows(self, rows: list[int]) -> Units:
        """The units of these probes, padded to the longest."""
        parts = [[self._file.get_tensor(f"{name}.{row}") for row in rows] for name in Units._fields]
        return Units(*(nn.utils.rnn.pad_sequence(part, batch_first=True) for part in parts))

    def stream(self, rows: list[int]) -> Iterator[Units]:
        """Yields the units of one probe at a time."""
        for row in rows:
            yield self.rows([row])


def digest(model: Any) -> str:
    """A hash of every byte of the reference's weights and buffers, and of its configuration.

    The hash that vectors carry is of a sample, which an edited row of the embedding need not touch. An adapter's own
    weights are left out: beside a frozen base they are those that train. So are names, which an adapter changes.
    """
    config = model.config.to_dict() | {"_name_or_path": None}  # wherever it lies
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    adapted = hasattr(model, "peft_config")
    for part in [*model.parameters(), *model.buffers()]:
        if not (adapted and part.requires_grad):
            found.update(f"{part.dtype}{tuple(part.shape)}".encode())
            # NumPy has no bfloat16, so all are bytes to it.
            found.update(part.detach().flatten().contiguous().cpu().view(torch.uint8).numpy())
    return found.hexdigest()


def reference(model: Any, probes: list[Probe], layers: list[int], role_weights: dict, weight_hash: str) -> Reference:
    """The reference's states, from the cache where model, probes, layers and weights of roles are unchanged.

    The reference is the model without its adapter, or before its first step; call it before training.
    """
    content = [weight_hash, str(next(model.parameters()).dtype), layers, role_weights, [list(map(repr, probes))]]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    path = default_model.cache_folder() / "reference-states" / f"{key}.safetensors"
    if not path.is_file():
        tensors = {}
        sequences = [probe.ids for probe in probes]
        with models.as_reference(model):
            for row, hidden in activations.states(model, sequences, layers, description="reference states"):
                states = dict(zip(layers, hidden[:, None], strict=True))
                units = gather(states, torch.zeros(1, dtype=torch.long), [probes[row]], role_weights)
                tensors |= {f"{name}.{row}": part[0].cpu() for name, part in units._asdict().items()}
        write(path, tensors)
    return Reference(path)


def casts_weights(accelerator: Any) -> bool:
    """Whether the weights are sharded by an engine that casts them for mixed precision: FSDP2 and DeepSpeed."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


@contextlib.contextmanager
def as_trained(accelerator: Any, model: Any) -> Generator[None]:
    """Inside, a model that is not yet prepared for training computes in the precision in which it will be trained.

    Under bf16 a reference in another precision differs by more than rounding, and no anchor would start at zero.
    Everywhere it is autocast, and FSDP2 and DeepSpeed cast all parameters too (their buffers stay).
    """
    lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    kept = [(part, part.data) for part in model.parameters()] if casts_weights(accelerator) and lower else []
    for part, data in kept:
        part.data = data.to(lower)
    try:
        with accelerator.autocast():
            yield
    finally:
        for part, data in kept:
            part.data = data


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, written aside and renamed: several processes may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
    os.replace(aside, path)
