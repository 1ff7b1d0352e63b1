"""Extraction against the bare forward pass of the cut body, on the same batches of the default model, side by side.

Prints tokens per second of both and their ratio, pair by pair in turn (A B A B ...), so that a machine whose speed
drifts does not decide. `python benchmarks/extraction.py [--pairs 9] [--stories 48]`

The bare pass gets token ids; extraction tokenises, pools and writes its shards within its time. On a CPU the clock
counts CPU seconds, which other processes do not change; on a GPU wall seconds up to the end of the GPU's work, and
`--peak-tflops` (of the card at the model's dtype, from its data sheet) adds the share of that peak.

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
    parser.add_argument("--peak-tflops", type=float, help="of the GPU at the model's dtype, for the share of it")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    parser.add_argument("--texts", type=int, help=argparse.SUPPRESS)  # the child process of --memory
    arguments = parser.parse_args()
    if arguments.texts:
        return _peak(arguments.model, arguments.texts)
    if arguments.memory:
        return _memory(arguments.model)
    _speed(arguments)


def _speed(arguments: argparse.Namespace) -> None:
    checkpoint = models.load(arguments.model)
    model = checkpoint.model
    layers = extraction.candidate_layers(models.text_config(model).num_hidden_layers)
    stories = corpora.spread(corpora.load_stories(), arguments.stories)
    sequences = [transcripts.encode_text(checkpoint.tokenizer, story.text).ids for story in stories]
    device = next(model.parameters()).device
    lengths = [len(sequence) for sequence in sequences]

    def bare() -> None:
        """The same padded batches through the cut body, and nothing else."""
        with torch.no_grad(), models.cut_after(model, max(layers)):
            for rows in activations.token_budget_batches(lengths, shards.TOKEN_BUDGET[device.type]):
                batch = activations.collate(rows, sequences, device)
                models.decoder(model)(**batch.inputs, use_cache=False)

    def extracting() -> None:
        items = {"stories": extraction.story_items(checkpoint.tokenizer, stories)}
        with tempfile.TemporaryDirectory() as folder:
            shards.read(checkpoint, items, layers, Path(folder))

    bare(), extracting()  # warm-up
    pairs = [(_seconds(bare), _seconds(extracting)) for _ in range(arguments.pairs)]
    ratios = sorted(plain / ours for plain, ours in pairs)
    tokens, unit = sum(lengths), "second" if torch.cuda.is_available() else "CPU second"
    print(
        f"{len(stories)} stories, {tokens} tokens, layers {layers[0]} to {layers[-1]}, {unit}s, {len(pairs)} pairs in "
        "turn"
    )
    for name, column in (("bare cut body", 0), ("extraction", 1)):
        speed = tokens / statistics.median(pair[column] for pair in pairs)
        share = ""
        if torch.cuda.is_available() and arguments.peak_tflops:
            share = f", {_operations(model, max(layers)) * speed / arguments.peak_tflops / 1e12:.1%} of the peak"
        print(f"{name:14} {speed:8.1f} tokens per {unit} (median){share}")
    print(f"ratio          {statistics.median(ratios):8.3f} (median; {ratios[0]:.3f} to {ratios[-1]:.3f})")


def _seconds(call) -> float:
    """Wall time on a GPU, whose work outlives the call; CPU time elsewhere."""
    if not torch.cuda.is_available():
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _operations(model, last: int) -> int:
    """Floating-point operations a token up to layer `last`: two for each weight of the blocks; attention's are few."""
    return 2 * sum(weight.numel() for block in models.blocks(model)[: last + 1] for weight in block.parameters())


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
