"""Readings of the training contexts, and ceilings from the reference's readings, computed once and cached."""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calibrate import activations, models, transcripts
from calibrate.corpora import Context
from calibrate.vectors import EmotionVectors


class Probe(NamedTuple):
    """A tokenised context with its shared reply, and where header and reply stand."""

    ids: list[int]
    header: slice
    reply: slice


class UnitReadings(NamedTuple):
    """Readings of each unit: the header first, then the reply's tokens. In sigma."""

    values: Tensor  # [rows, units, layers, directions]
    weights: Tensor  # [rows, units], zero where padded; header and reply each sum to their role's weight


def prepare(tokenizer, contexts: list[Context], reply_tokens: int) -> list[Probe]:
    """Tokenises contexts, each followed by the first `reply_tokens` tokens of its reply."""
    probes = []
    for context in contexts:
        encoded = transcripts.encode(tokenizer, context.messages, context.reply)
        header, reply = encoded.last("header"), encoded.last("reply")
        stop = min(reply.stop, reply.start + reply_tokens)
        probes.append(Probe(encoded.ids[:stop], slice(header.start, header.stop), slice(reply.start, stop)))
    return probes


class Reader:
    """Turns recorded hidden states into unit readings, with the reference's mu and sigma; gradients pass through.

    Args:
        directions: [directions, layers, hidden] at all layers of `vectors`.
        layers: the layers to read, a subset of the vectors' layers.
    """

    def __init__(
        self, vectors: EmotionVectors, directions: Tensor, layers: list[int], header_weight: float, reply_weight: float
    ):
        at = vectors.positions(layers)
        self.layers = layers
        self.role_weights = (header_weight, reply_weight)
        self.directions = directions[:, at].float().transpose(0, 1)  # [layers, directions, hidden]
        self._centres, self._sigmas = [], []
        for pooling in ("header", "token"):
            mu, sigma = vectors.scale(pooling, directions)
            self._centres.append(torch.einsum("lh,dlh->ld", mu[at], directions[:, at].double()).float())
            self._sigmas.append(sigma[:, at].T.float())

    def __call__(self, states: dict[int, Tensor], first: Tensor, probes: list[Probe]) -> UnitReadings:
        """Reads recorded states [batch, tokens, hidden] by layer of the rows that `probes` describe."""
        device = states[self.layers[0]].device
        hidden = torch.stack([states[layer] for layer in self.layers])  # [layers, batch, tokens, hidden]
        # float32 also under bf16 training: the readings are differences of large numbers.
        projected = torch.einsum("lbth,ldh->btld", hidden.float(), self.directions.to(device))
        (header_centre, token_centre), (header_sigma, token_sigma) = (
            [part.to(device) for part in parts] for parts in (self._centres, self._sigmas)
        )
        units = 1 + max(probe.reply.stop - probe.reply.start for probe in probes)
        values, weights = [], torch.zeros(len(probes), units, device=device)
        for row, probe in enumerate(probes):
            start = int(first[row])
            header = projected[row, start + probe.header.start : start + probe.header.stop].mean(0)
            reply = projected[row, start + probe.reply.start : start + probe.reply.stop]
            read = torch.cat([((header - header_centre) / header_sigma)[None], (reply - token_centre) / token_sigma])
            values.append(nn.functional.pad(read, (0, 0, 0, 0, 0, units - len(read))))
            weights[row, 0] = self.role_weights[0]
            weights[row, 1 : len(read)] = self.role_weights[1] / (len(read) - 1)
        return UnitReadings(torch.stack(values), weights)


def reference_readings(
    model: nn.Module, reader: Reader, probes: list[Probe], weight_hash: str, token_budget: int = 2048
) -> UnitReadings:
    """The reference's readings of all probes, from the cache where model, probes and reader are unchanged."""
    key = hashlib.sha256(weight_hash.encode())
    key.update(json.dumps([probes_key(probes), reader.layers, reader.role_weights]).encode())
    for tensor in (reader.directions, *reader._centres, *reader._sigmas):
        key.update(tensor.numpy().tobytes())
    path = models.cache_folder() / "reference-readings" / f"{key.hexdigest()[:32]}.safetensors"
    if not path.is_file():
        _write(path, _read_all(model, reader, probes, token_budget))
    return UnitReadings(**load_file(path))


def probes_key(probes: list[Probe]) -> list:
    """What identifies the probes, as plain lists."""
    return [[p.ids, p.header.start, p.header.stop, p.reply.start, p.reply.stop] for p in probes]


@torch.no_grad()
def _read_all(model: nn.Module, reader: Reader, probes: list[Probe], token_budget: int) -> UnitReadings:
    units = 1 + max(probe.reply.stop - probe.reply.start for probe in probes)
    shape = (len(probes), units, len(reader.layers), reader.directions.shape[1])
    values, weights = torch.zeros(shape), torch.zeros(shape[:2])
    sequences = [probe.ids for probe in probes]
    for row, hidden in activations.states(
        model, sequences, reader.layers, token_budget=token_budget, description="reference readings"
    ):
        states = dict(zip(reader.layers, hidden[:, None], strict=True))
        read = reader(states, torch.zeros(1, dtype=torch.long), [probes[row]])
        values[row, : read.values.shape[1]] = read.values[0].cpu()
        weights[row, : read.weights.shape[1]] = read.weights[0].cpu()
    return UnitReadings(values, weights)


def _write(path: Path, readings: UnitReadings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file(readings._asdict(), aside)
    os.replace(aside, path)


def reduce_ceilings(passing: UnitReadings, quantile: float) -> Tensor:
    """Ceilings [2, layers, directions]: that quantile of the twins' reference readings at header and reply."""
    header = passing.values[:, 0]
    tokens = passing.values[:, 1:][passing.weights[:, 1:] > 0]
    return torch.stack([header.quantile(quantile, dim=0), tokens.quantile(quantile, dim=0)])


def per_unit(ceilings: Tensor, units: int) -> Tensor:
    """Repeats [header, reply] ceilings to [units, layers, directions]: unit 0 is the header."""
    return torch.cat([ceilings[:1], ceilings[1:].expand(units - 1, -1, -1)])
