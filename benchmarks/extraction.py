"""Extraction against the bare forward pass of the cut body, on the same batches of the default model, side by side.

Prints tokens per second of both and their ratio, pair by pair in turn (A B A B ...), so that a machine whose speed
drifts does not decide. `python benchmarks/extraction.py [--pairs 9] [--stories 48]`
"""

import argparse
import statistics
import time

import torch

from calibrate import activations, corpora, extraction, models, transcripts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--pairs", type=int, default=9, help="timed pairs (default: %(default)s)")
    parser.add_argument("--stories", type=int, default=48, help="stories a pass (default: %(default)s)")
    arguments = parser.parse_args()

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
        extraction.read_stories(checkpoint, stories, layers)

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


if __name__ == "__main__":
    main()
