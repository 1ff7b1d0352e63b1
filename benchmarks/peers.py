"""Extraction beside other tools' own extraction functions on the same stories, the same model, one process, in turn.

`python benchmarks/peers.py --peers FOLDER` where FOLDER/NAME holds each unpacked wheel (`pip download`,
unzip; their pins clash with ours and with one another, so they run on our torch and transformers). A peer that is
absent or fails is named as such. Each peer stands beside two runs of ours: that of the band, which is what we do by
default, and one of all layers with as many texts a batch as the peer has. Ratios are medians over the rounds with
their 95 % bootstrap interval. Fidelity is the worst cosine of a concept's centred mean with a float64 reference which
reads one text at a time; tools that return another thing (the last token of pairs) have none.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from calibrate import activations, corpora, models, shards, stats, transcripts
from calibrate.shards import Item
from calibrate.vectors import load_vectors

BAND = "calibrate, the band"
START = 50  # tokens skipped, as the peers do


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--peers", type=Path, required=True, help="folder with the unpacked wheels by name")
    parser.add_argument("--pairs", type=int, default=9, help="timed rounds (default: %(default)s)")
    parser.add_argument("--stories", type=int, default=60, help="stories a pass (default: %(default)s)")
    arguments = parser.parse_args()
    sys.path += [str(folder) for folder in arguments.peers.iterdir() if folder.is_dir()]

    checkpoint = models.load(arguments.model)
    concepts = list(dict.fromkeys(story.concept for story in corpora.load_stories()))[:10]
    stories = [story for story in corpora.load_stories() if story.concept in concepts]
    stories = corpora.spread(stories, arguments.stories)
    layers = load_vectors("default").used_band()
    everything = list(range(models.text_config(checkpoint.model).num_hidden_layers))
    reference = _centred(_one_by_one(checkpoint, stories, everything), stories)

    peers = _peers(checkpoint, stories, everything)
    equal = {name: f"calibrate, all layers, batch {batch}" for name, (batch, _) in peers.items()}
    runs: dict[str, Callable[[], torch.Tensor | None]] = {
        BAND: lambda: _ours(checkpoint, stories, layers),
        "calibrate, all layers": lambda: _ours(checkpoint, stories, everything),
    }
    for batch in sorted({batch for batch, _ in peers.values()}):
        runs[f"calibrate, all layers, batch {batch}"] = lambda batch=batch: _ours(
            checkpoint, stories, everything, batch
        )
    runs |= {name: run for name, (_, run) in peers.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    fidelity: dict[str, str] = {}
    for name, run in list(runs.items()):  # warm-up, fidelity, and who can run at all
        try:
            result = run()
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
            print(f"{name}: does not run here ({type(error).__name__}: {' '.join(str(error).split())[:120]})")
            del runs[name], times[name]
            continue
        fidelity[name] = "other quantity"
        if result is not None:
            kept = layers if result.shape[1] == len(layers) else everything
            fidelity[name] = f"{_worst(_centred(result, stories), reference[:, kept]):.6f}"
    for _ in range(arguments.pairs):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    tokens = sum(len(transcripts.encode_text(checkpoint.tokenizer, story.text).ids) for story in stories)
    print(f"{len(stories)} stories, {tokens} tokens, {arguments.pairs} rounds in turn, CPU seconds, medians")
    for name, seconds in times.items():
        print(
            f"{name:42} {statistics.median(seconds):7.2f} s  {tokens / statistics.median(seconds):7.0f} tokens/s  "
            f"times the band {_ratio(seconds, times[BAND])}  worst cosine {fidelity[name]}"
        )
        if name in equal:
            print(f"{'':42} times ours at its batch size, all layers {_ratio(seconds, times[equal[name]])}")


def _ratio(theirs: list[float], ours: list[float]) -> str:
    """Median over the rounds of theirs by ours, with its bootstrap interval."""
    ratios = np.array(theirs) / np.array(ours)
    estimate, low, high = stats.bootstrap(lambda drawn: float(np.median(drawn)), ratios)
    return f"{estimate:5.2f} [{low:.2f}, {high:.2f}]"


def _ours(checkpoint, stories: list, layers: list[int], batch: int | None = None) -> torch.Tensor:
    """Mean states from token 50, [stories, layers, hidden], through the shards on disk.

    `batch` texts at a time, longest first as always; by default as many as the budget of tokens takes.
    """
    encoded = [transcripts.encode_text(checkpoint.tokenizer, story.text).ids for story in stories]
    items = [Item(ids, [[slice(START, len(ids))]]) for ids in encoded]
    usual = activations.token_budget_batches
    batches = usual if batch is None else lambda lengths, _: _equal_batches(lengths, batch)
    with mock.patch.object(activations, "token_budget_batches", batches), tempfile.TemporaryDirectory() as folder:
        group = shards.read(checkpoint, {"stories": items}, layers, Path(folder))["stories"]
        return torch.stack([means[0] for _, means, _ in group.stream()])


def _equal_batches(lengths: list[int], size: int) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + size] for start in range(0, len(order), size)]


def _one_by_one(checkpoint, stories: list, layers: list[int]) -> torch.Tensor:
    """The float64 reference: no batch, no padding, `output_hidden_states` of the whole model."""
    rows = []
    for story in stories:
        ids = torch.tensor([transcripts.encode_text(checkpoint.tokenizer, story.text).ids])
        with torch.no_grad():
            hidden = checkpoint.model(input_ids=ids, output_hidden_states=True).hidden_states
        rows.append(torch.stack([hidden[layer + 1][0, START:].double().mean(0) for layer in layers]))
    return torch.stack(rows)


def _centred(states: torch.Tensor, stories: list) -> torch.Tensor:
    concepts = list(dict.fromkeys(story.concept for story in stories))
    means = torch.stack(
        [
            states[[i for i, story in enumerate(stories) if story.concept == concept]].double().mean(0)
            for concept in concepts
        ]
    )
    return means - means.mean(0)


def _worst(found: torch.Tensor, reference: torch.Tensor) -> float:
    """The smallest cosine over concepts and layers; the last layer is left out (`hidden_states` norms it)."""
    last = min(found.shape[1], reference.shape[1])
    keep = last - 1 if last > 20 else last
    return float(torch.cosine_similarity(found[:, :keep], reference[:, :keep], dim=-1).min())


def _peers(checkpoint, stories: list, layers: list[int]) -> dict[str, tuple[int, Callable[[], torch.Tensor | None]]]:
    """(texts a batch, each peer's own function at its own defaults), by name."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    texts = [story.text for story in stories]

    def character_lens() -> torch.Tensor:
        from character_lens.extraction import extract_activations  # ty: ignore[import-not-found]

        return torch.stack(extract_activations(model, tokenizer, texts, START)[1:], 1)

    def emotion_probes(batch_size: int) -> torch.Tensor:
        from emotion_probes.extract import extract_activations  # ty: ignore[import-not-found]

        class Saver:
            """Takes the tokens as its own does, without the disk."""

            def __init__(self):
                self.rows: dict = {}

            def enqueue(self, layer, key, states):
                self.rows[layer, key] = torch.from_numpy(states)

        saver = Saver()
        prompts = [(str(i), text) for i, text in enumerate(texts)]
        extract_activations(model, tokenizer, prompts, layers, saver, batch_size)
        return torch.stack(
            [torch.stack([saver.rows[layer, key][START:].mean(0) for layer in layers]) for key, _ in prompts]
        )

    def steering_vectors() -> None:
        from steering_vectors import train_steering_vector  # ty: ignore[import-not-found]

        half = len(texts) // 2
        train_steering_vector(model, tokenizer, list(zip(texts[:half], texts[half : 2 * half], strict=True)))

    def repeng() -> None:
        np.float_ = np.float64  # ty: ignore[missing-attribute]  # removed in NumPy 2; repeng 0.4.0 names it
        from repeng.extract import batched_get_hiddens  # ty: ignore[import-not-found]

        batched_get_hiddens(model, tokenizer, texts, layers[1:], 32)

    return {
        "character-lens 0.2.0.dev0": (1, character_lens),
        "emotion-probes 0.1.0, batch 1 (default)": (1, lambda: emotion_probes(1)),
        "emotion-probes 0.1.0, batch 8": (8, lambda: emotion_probes(8)),
        "steering-vectors 0.12.2 (last token)": (1, steering_vectors),
        "repeng 0.4.0, batch 32 (last token)": (32, repeng),
    }


if __name__ == "__main__":
    main()
