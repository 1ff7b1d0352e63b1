"""The cases that run alike on one process and on two: trainer, full or LoRA, with all calibration terms."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig

from calibrate import corpora, models
from calibrate.training import adapters, runs
from calibrate.training.configs import CalibratedDPOConfig, CalibratedGRPOConfig, CalibratedSFTConfig
from calibrate.training.objective import Data
from calibrate.training.trainers import CalibratedDPOTrainer, CalibratedGRPOTrainer, CalibratedSFTTrainer

KINDS = {
    "sft": (CalibratedSFTConfig, CalibratedSFTTrainer),
    "dpo": (CalibratedDPOConfig, CalibratedDPOTrainer),
    "grpo": (CalibratedGRPOConfig, CalibratedGRPOTrainer),
}
CASES: dict[str, dict] = {
    "sft-lora": {"kind": "sft", "lora": True},
    "sft-full": {"kind": "sft", "lora": False, "accumulation": 2},
    "sft-lora-checkpointing": {"kind": "sft", "lora": True, "gradient_checkpointing": True},
    "dpo-lora": {
        "kind": "dpo", "lora": True, "accumulation": 2, "arm": "hinge-refit", "refit_every": 1, "refit_stories": 2,
        "refit_turns": 2,
    },
    "dpo-full": {"kind": "dpo", "lora": False},
    "grpo-lora": {"kind": "grpo", "lora": True, "reading_use": "both", "auroc_gate": 0.0},
    "grpo-full": {"kind": "grpo", "lora": False, "reading_use": "both", "auroc_gate": 0.0, "reading_by": "policy"},
}  # fmt: skip
# Plain gradient descent: Adam would magnify the last digit.
COMMON: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-3, "optim": "sgd",
    "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
    "report_to": "none", "disable_tqdm": True, "max_steps": 2, "penalty_weight": 1.0, "penalty_warmup_steps": 0,
    "text_anchor_every": 1, "arm": "hinge-frozen",
}  # fmt: skip


def short(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content[-160:]}]


def texts() -> tuple[Data, list[dict]]:
    """Four tasks' twins and pairs, and anchors, cut short: a width of 32 reads them in no time."""
    twins = [
        tuple(context._replace(messages=short(context.messages[-1]["content"])) for context in twin)
        for twin in corpora.load_twins()
        if twin[0].split == "train"
    ][:4]
    places = {(failing.task, failing.context) for failing, _ in twins}
    pairs = [p for p in corpora.load_pairs() if (p.task, p.context) in places and p.kind == "honest"]
    rows = [{"prompt": short(p.prompt[-1]["content"]), "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    dialogues = [
        row._replace(messages=[message | {"content": message["content"][:100]} for message in row.messages[:2]])
        for row in corpora.load_neutral()[:5]
    ]
    stories = [story._replace(text=story.text[:150]) for story in corpora.load_stories()[:48]]
    return Data(twins, dialogues, stories), (rows * 4)[:16]


def vowels(completions, **_):
    return [sum(c in "aeiou" for c in turn[-1]["content"]) / 10 for turn in completions]


class FixedGRPO(CalibratedGRPOTrainer):
    """Completions that depend on the prompt and on their place in the global batch alone."""

    def _generate_single_turn(self, prompt_ids, *_, **__):
        first = self.accelerator.process_index * len(prompt_ids)
        rows = enumerate(prompt_ids, first)
        return [[5 + (len(ids) + 7 * row + 3 * place) % 500 for place in range(6)] for row, ids in rows], None


def build(case: dict, out: Path, setup: dict):
    """The trainer of one case, at a global batch of 4 rows and 4 contexts whatever the number of processes."""
    options = {key: value for key, value in case.items() if key not in ("kind", "lora", "accumulation")}
    config, kind = KINDS[case["kind"]]
    processes, accumulation = setup["processes"], case.get("accumulation", 1)
    data, rows = texts()
    options |= {"vectors": setup["vectors"], "output_dir": str(out)} | setup.get("options", {})
    options |= {"contexts_per_step": 4 // processes // accumulation}
    options |= {"per_device_train_batch_size": 4 // processes // accumulation}
    options |= {"gradient_accumulation_steps": accumulation}
    if case["kind"] == "grpo":
        options |= {"num_generations": 2, "max_completion_length": 8, "temperature": 1.0}
        rows = [{"prompt": row["prompt"]} for row in rows]
    else:
        options |= {"max_length": 256}
    if case["kind"] == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    args = config(**COMMON | options)
    with runs.whole_model(args):
        checkpoint = models.load(setup["model"])
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if case["lora"] else None
    adapters.keep_below_band(lora, args)
    extra = {"reward_funcs": vowels} if case["kind"] == "grpo" else {}
    return (FixedGRPO if case["kind"] == "grpo" else kind)(
        model=checkpoint.model, args=args, processing_class=checkpoint.tokenizer,
        train_dataset=Dataset.from_list(rows), peft_config=lora, data=data,
        weight_hash=checkpoint.weight_hash, **extra,
    )  # fmt: skip
