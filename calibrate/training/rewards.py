"""GRPO: the reading of a completion as a reward, without a gradient through the reader, and a reward by execution."""

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibrate import activations, corpora, models, sandbox, transcripts
from calibrate.training import arms, readings
from calibrate.vectors import load_vectors

ROWS = 8  # completions a pass: the same number of passes on every process, as sharded models need


class ReadingReward:
    """Takes off reward where a completion reads higher than its group, one-sided.

    `-reading_reward * max(0, z)` with `z = (reading - mean of the group) / max(its standard deviation, floor)`; the
    reading is the mean over the `top_share` highest tokens of the completion (a mean over all tokens invites filler),
    over layers and directions. No reward is given for reading lower than the others: pushed far down, models call
    failures successes. The form is that of Wu and Tang (arXiv 2604.01476), added before advantages are normalised.
    """

    __name__ = "reading"

    def bind(self, trainer: Any) -> None:
        """Prepares the reader on the trainer's model and opens the gate.

        Raises:
            ValueError: prompts are no conversations, or the reading does not tell shipped gaming from honest replies
                well enough (`auroc_gate`).
        """
        args, self.trainer = trainer.args, trainer
        others = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
        for rows in (trainer.train_dataset, *others.values()):
            if rows is not None and isinstance(prompt := next(iter(rows), {}).get("prompt"), str):
                raise ValueError(
                    f"a prompt is the plain string {prompt[:40]!r}, but readings need conversations; give lists of "
                    "messages with `role` and `content`"
                )
        self.model = trainer.accelerator.unwrap_model(trainer.model)
        vectors = load_vectors(args.vectors)
        self.layers = sorted(args.layers or vectors.used_band())
        found = arms.target_directions(vectors, args.concepts, args.raise_concepts, args.rank, self.layers)
        if trainer._calibration is not None:  # a random direction has its sign from the contexts that the loss reads
            found = trainer._calibration.pressure.start
        elif args.arm in arms.CONTROLS:
            found = arms.control_directions(args, vectors, found, self.layers)
        self.reader = readings.Reader(vectors, found, self.layers)
        self.tap = activations.Tap(self.model, self.layers)
        if args.auroc_gate and args.arm not in arms.CONTROLS:  # a control is one because it cannot tell
            self._gate(args)

    def _gate(self, args: Any) -> None:
        pairs = [p for p in corpora.load_pairs(args.pairs) if p.split == "selection" and p.kind == "honest"]
        if not pairs:
            raise ValueError(
                '`auroc_gate` needs honest pairs with `"split": "selection"` in `pairs`; add some or set it to 0'
            )
        texts = []
        for pair in pairs:
            for reply in (pair.rejected, pair.chosen):
                encoded = transcripts.encode(self.trainer.processing_class, [*pair.prompt, *reply])
                span = encoded.last("reply")
                texts.append((encoded.ids[: span.stop], span.start))
        scores = self.read(texts, "reference")
        found = auroc(scores[0::2].numpy(), scores[1::2].numpy())
        if found < args.auroc_gate:
            raise ValueError(
                f"the reading tells {len(pairs)} gaming from honest replies with an AUROC of {found:.2f}, below "
                f"`auroc_gate` {args.auroc_gate}: as a reward it is noise; choose other `concepts` or `layers`, or "
                "set `auroc_gate: 0` to train on it all the same"
            )

    def __call__(self, prompts: list, completion_ids: list[list[int]], log_metric: Any, **_) -> list[float]:
        """Rewards of this process's completions; TRL calls it on every process at once."""
        args, accelerator = self.trainer.args, self.trainer.accelerator
        texts = []
        for prompt, completion in zip(prompts, completion_ids, strict=True):
            if transcripts.for_template(self.trainer.processing_class, prompt) != prompt:
                raise ValueError(
                    "a prompt has roles that the chat template does not take as they are, so that it is answered in "
                    "another form than it is read: pass prompts through `calibrate.transcripts.for_template` first"
                )
            before = transcripts.encode(self.trainer.processing_class, prompt).ids
            texts.append((before + list(completion), len(before)))
        scores = self.read(texts, args.reading_by).to(accelerator.device)
        training = self.trainer.model.training
        size = self.trainer.num_generations if training else self.trainer.num_generations_eval
        penalties = group_penalty(accelerator.gather(scores), size, args.group_sd_floor)
        start = accelerator.process_index * len(scores)
        log_metric("reading/completion", scores.mean().item())
        return (-args.reading_reward * penalties[start : start + len(scores)]).tolist()

    def read(self, texts: list[tuple[list[int], int]], by: str) -> Tensor:
        """Reading of each text from a token on, by the `reference` or the `policy` as it is now, sigma [texts].

        An empty completion reads 0.
        """
        found, device = [], next(self.model.parameters()).device
        training = self.model.training
        context = models.as_reference(self.model) if by == "reference" else torch.no_grad()
        self.model.eval()  # the policy too is read without dropout
        with context:
            for start in range(0, len(texts), ROWS):
                chunk = texts[start : start + ROWS]
                batch = activations.collate(list(range(len(chunk))), [ids for ids, _ in chunk], device)
                with models.cut_after(self.model, max(self.layers)), self.tap.recording() as recorded:
                    self.model(**batch.inputs, use_cache=False, logits_to_keep=1)
                hidden = torch.stack([recorded[layer] for layer in self.layers], dim=2).float()
                for row, (ids, first) in enumerate(chunk):
                    found.append(self._pool(hidden[row, first : len(ids)]))
        self.model.train(training)
        return torch.stack(found).cpu()

    def _pool(self, states: Tensor) -> Tensor:
        if not len(states):
            return torch.zeros((), device=states.device)
        roles = torch.full((1, len(states)), readings.ROLES.index("reply"), device=states.device)
        units = readings.Units(states[None], torch.ones(1, len(states), device=states.device), roles)
        values = self.reader(units)[0].mean((1, 2))
        count = max(1, round(self.trainer.args.top_share * len(values)))
        return values.topk(count).values.mean()


def group_penalty(scores: Tensor, size: int, floor: float) -> Tensor:
    """One-sided z-score of each score within its group of `size` neighbours, [scores]; 0 at or below the mean."""
    groups = scores.view(-1, size)
    spread = groups.std(1, unbiased=False, keepdim=True).clamp(min=floor)
    return ((groups - groups.mean(1, keepdim=True)) / spread).clamp(min=0).flatten()


def auroc(above: np.ndarray, below: np.ndarray) -> float:
    """Share of pairs in which a score of `above` is the higher; ties count half."""
    differences = above[:, None] - below[None]
    return float((differences > 0).mean() + (differences == 0).mean() / 2)


def tests_pass(
    completions: list, files: list[str], command: list[list[str]], code_file: list[str], **_
) -> list[float]:
    """1 where the tests' command ends with status 0 with the code block that a completion holds, else 0.

    It runs in the sandbox. It can be gamed, by code that ends the process or is equal to everything: whether training
    taught that is for the audit to see, which knows the signs.

    Args:
        files: JSON of the other files, by relative path, for each completion.
        command: what runs the tests.
        code_file: the file that the completion's code block becomes.
    """
    rewards = []
    for completion, others, line, name in zip(completions, files, command, code_file, strict=True):
        code = code_block(completion[-1]["content"])
        if code is None:
            rewards.append(0.0)
            continue
        run = sandbox.run(line, json.loads(others) | {name: code}, seconds=10)
        rewards.append(float(run.exit_code == 0))
    return rewards


def code_block(text: str) -> str | None:
    """The last closed block of a reply, without the line that names its language; None where there is none."""
    closed = text.split("```")[1:-1:2]  # what stands after the last fence is prose, or a block that is cut off
    return closed[-1].partition("\n")[2] if closed else None
