"""The audit's reading of contexts against the bare forward passes that it needs, side by side on the default model.

Prints tokens per CPU second (wall seconds on a GPU) of both and their ratio, pair by pair in turn. The bare passes are
the same shared beginnings and padded continuations at full depth, with the scores of every reply's tokens and of the
last ones of the others; the audit renders, tokenises, pools, reads and scores within its time.
`python benchmarks/audit.py [--pairs 9] [--tasks 2]`

`--whole` prints instead how long `calibrate audit default` takes, by its wall clock and in CPU seconds, which are what
counts on a shared machine.
"""

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path

import torch

from calibrate import activations, corpora, models
from calibrate.audit import contexts
from calibrate.corpora.situations import FailureQuestion, load
from calibrate.vectors import load_vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9, help="timed pairs (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=2, help="tasks, two contexts each (default: %(default)s)")
    parser.add_argument("--whole", action="store_true", help="time the whole quick audit instead")
    arguments = parser.parse_args()
    if arguments.whole:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            command = [sys.executable, "-m", "calibrate.cli", "audit", "default", "--out", str(Path(folder) / "out")]
            subprocess.run(command, check=True)
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            wall, busy = time.perf_counter() - start, used.ru_utime + used.ru_stime
            threads = torch.get_num_threads()
            return print(f"calibrate audit default: {wall:.0f} s, {busy:.0f} CPU seconds, on {threads} threads")
    checkpoint, vectors = models.load("default"), load_vectors("default")
    twins = [twin for twin in corpora.load_twins() if twin[0].split == "audit" and twin[0].context == "plain"]
    twins = corpora.of_tasks(twins, arguments.tasks)
    held = {failing.task for failing, _ in twins}
    pairs = [p for p in corpora.load_pairs() if p.task in held and p.context == "plain" and p.kind == "honest"]
    asked: list[tuple[list[list[int]], list[list[int]]]] = []  # token ids: a context's replies, what is not scored
    whole = activations.branched

    def remember(model, sequences, layers, unscored):
        asked.append((sequences, unscored))
        return whole(model, sequences, layers, unscored)

    def audit() -> None:
        contexts.read(checkpoint, vectors, twins, pairs, load(FailureQuestion), [], "desperate")

    with unittest.mock.patch.object(activations, "branched", remember):
        audit()
    jobs = list(asked)

    def bare() -> None:
        for parts in jobs:
            _bare(checkpoint.model, *parts)

    bare()
    timed = [(_seconds(bare), _seconds(audit)) for _ in range(arguments.pairs)]
    every = [[*replies, *others] for replies, others in jobs]
    tokens = sum(_shared(sequences) + sum(len(s) - _shared(sequences) for s in sequences) for sequences in every)
    ratios = sorted(plain / ours for plain, ours in timed)
    print(
        f"{len(jobs)} contexts with {sum(map(len, every))} continuations, {tokens} tokens, {len(timed)} pairs in turn"
    )
    for name, column in (("bare passes", 0), ("audit", 1)):
        print(
            f"{name:12} {tokens / statistics.median(pair[column] for pair in timed):8.1f} tokens per second (median)"
        )
    print(f"ratio        {statistics.median(ratios):8.3f} (median; {ratios[0]:.3f} to {ratios[-1]:.3f})")


def _shared(sequences: list[list[int]]) -> int:
    return next(i for i, tokens in enumerate(zip(*sequences, strict=False)) if len({*tokens}) > 1)


@torch.no_grad()
def _bare(model, replies: list[list[int]], others: list[list[int]]) -> None:
    """The same passes and nothing else: no hooks, no states kept."""
    from transformers import DynamicCache

    shared, device = _shared([*replies, *others]), next(model.parameters()).device
    cache = DynamicCache(config=models.text_config(model))
    model(input_ids=torch.tensor([replies[0][:shared]], device=device), past_key_values=cache, logits_to_keep=1)
    for sequences in (replies, others):
        continued = copy.deepcopy(cache)
        continued.batch_repeat_interleave(len(sequences))
        batch = activations.collate([*range(len(sequences))], [sequence[shared:] for sequence in sequences], device)
        mask = torch.nn.functional.pad(batch.inputs["attention_mask"], (shared, 0), value=1)
        ends = sorted({len(sequence) - shared - 1 for sequence in sequences})
        model(
            input_ids=batch.inputs["input_ids"], attention_mask=mask, past_key_values=continued,
            position_ids=batch.inputs["position_ids"] + shared,
            logits_to_keep=0 if sequences is replies else torch.tensor(ends, device=device),
        )  # fmt: skip


def _seconds(call) -> float:
    """CPU time, or on a GPU wall time up to the end of its work."""
    if not torch.cuda.is_available():
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
