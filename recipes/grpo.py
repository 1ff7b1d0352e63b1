"""
Calibrated reinforcement learning: GRPO on failing tests, rewarded by execution, with readings in the reward.

```bash
accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/grpo.py \
    --config recipes/smollm2-135m/grpo.yaml
```

Each prompt is a failing transcript of a Python task; the code block of a completion replaces the file that it mends,
and the task's tests run in the sandbox. Run the same command again after a stop: it resumes.
"""

import json

from calibrate import corpora
from calibrate.training import arms, rewards, runs
from calibrate.training.configs import CalibratedGRPOConfig
from calibrate.training.trainers import CalibratedGRPOTrainer
from calibrate.transcripts import for_template


def main(training_args: CalibratedGRPOConfig, model_args) -> None:
    from datasets import Dataset

    run = runs.prepare(training_args, model_args)
    if run.resume_from == runs.FINISHED:
        return print(f"{training_args.output_dir} already holds this run, finished; nothing to do")
    repairs = [repair for repair in corpora.load_repairs(training_args.repairs) if repair.split == "train"]
    tasks = corpora.spread(list(dict.fromkeys(repair.task for repair in repairs)), training_args.max_tasks)
    rows = [
        {"prompt": for_template(run.checkpoint.tokenizer, arms.prompt_of(training_args.arm, repair.prompt)),
         "command": repair.command, "code_file": repair.code_file, "files": json.dumps(repair.files)}
        for repair in repairs if repair.task in tasks
    ]  # fmt: skip
    trainer = CalibratedGRPOTrainer(
        model=run.checkpoint.model,
        args=training_args,
        processing_class=run.checkpoint.tokenizer,
        train_dataset=Dataset.from_list(rows),
        reward_funcs=rewards.tests_pass,
        peft_config=run.peft_config,
        data=run.data,
        weight_hash=run.checkpoint.weight_hash,
    )
    runs.train(trainer, run)


if __name__ == "__main__":
    runs.main(main, CalibratedGRPOConfig)
