"""Extraction against the bare forward pass of the cut body, on the same batches of the default model, side by side.

Prints tokens per second of both and their ratio, pair by pair in turn (A B A B ...), so that a machine whose speed
drifts does not decide. `python benchmarks/extraction.py [--pairs 9] [--stories 48]`

`--memory` prints instead the peak resident memory of a process that reads 200 texts and of one that reads 2,000 (their
first 48 tokens), which must not differ.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from calibrate import activations, corpora, extraction, models, shards, transcripts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--pairs", type=int, default=9, help="timed pairs (default: %(default)s)")
    parser.add_argument("--stories", type=int, default=48, help="stories a pass (default: %(default)s)")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    parser.add_argument("--texts", type=int, help=argparse.SUPPRESS)  # the child process of --memory
    arguments = parser.parse_args()
    if arguments.texts:
        return _peak(arguments.model, arguments.texts)
    if arguments.memory:
        return _memory(arguments.model)

    checkpoint = models.load(arguments.model)
    model = checkpoint.model
    depth = models.text_config(model).num_hidden_layers
    layers = extraction.candidate_layers(depth)
    stories = corpora.spread(corpora.load_stories(), arguments.stories)
    tokens = sum(len(transcripts.encode_text(checkpoint.tokenizer, story.text).ids) for story in stories)

    def bare() -> None:
        """The same padded batches through the cut body, and nothing else."""
        sequences = [transcripts.encode_text(checkpoint.tokenizer, story.text).ids for story in stories]
        lengths = [len(sequence) for sequence in sequences]
        with torch.no_grad(), models.cut_after(model, max(layers)):
            for rows in activations.token_budget_batches(lengths, 2048):
                batch = activations.collate(rows, sequences, next(model.parameters()).device)
                models.decoder(model)(**batch.inputs, use_cache=False)

    def extracting() -> None:
        items = {"stories": extraction.story_items(checkpoint.tokenizer, stories)}
        with tempfile.TemporaryDirectory() as folder:
            shards.read(checkpoint, items, layers, Path(folder))

    def seconds(call) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    bare(), extracting()  # warm-up
    pairs = [(seconds(bare), seconds(extracting)) for _ in range(arguments.pairs)]
    ratios = sorted(plain / ours for plain, ours in pairs)
    print(
        f"{len(stories)} stories, {tokens} tokens, layers {layers[0]} to {layers[-1]}, CPU seconds, {len(pairs)} "
        f"pairs in turn"
    )
    for name, column in (("bare cut body", 0), ("extraction", 1)):
        print(
            f"{name:14} {tokens / statistics.median(pair[column] for pair in pairs):8.1f} tokens per CPU second "
            f"(median)"
        )
    print(f"ratio          {statistics.median(ratios):8.3f} (median; {ratios[0]:.3f} to {ratios[-1]:.3f})")


def _memory(model: str) -> None:
    """Peak memory of reading 200 and 2,000 texts, each in a process of its own."""
    peaks = {}
    for texts in (200, 2000):
        child = [sys.executable, __file__, "--model", model, "--texts", str(texts)]
        run = subprocess.run(child, capture_output=True, text=True, check=True)
        peaks[texts] = float(run.stdout.split()[-1])
        print(f"{texts:5} texts: peak {peaks[texts]:.0f} MiB")
    print(f"ratio {peaks[2000] / peaks[200]:.3f}")


def _peak(name: str, texts: int) -> None:
    checkpoint = models.load(name)
    layers = extraction.candidate_layers(models.text_config(checkpoint.model).num_hidden_layers)
    stories = corpora.load_stories()
    ids = [
        transcripts.encode_text(checkpoint.tokenizer, stories[i % len(stories)].text).ids[:48] for i in range(texts)
    ]
    items = {"stories": [shards.Item(row, [[slice(12, 48)]]) for row in ids]}
    with tempfile.TemporaryDirectory() as folder:
        group = shards.read(checkpoint, items, layers, Path(folder))["stories"]
        group.sums([i % 171 for i in range(texts)], 171)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
