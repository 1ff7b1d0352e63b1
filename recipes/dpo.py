"""
Calibrated preference tuning: LoRA DPO on failing-test contexts with a penalty on the desperation reading.

```bash
accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/dpo.py \
    --config recipes/smollm2-135m/dpo.yaml
```

Run the same command again after a stop: it resumes from the last checkpoint.
"""

from calibrate.training import runs
from calibrate.training.configs import CalibratedDPOConfig
from calibrate.training.trainers import CalibratedDPOTrainer


def main(training_args: CalibratedDPOConfig, model_args) -> None:
    from datasets import Dataset

    run = runs.prepare(training_args, model_args)
    if run.resume_from == runs.FINISHED:
        return print(f"{training_args.output_dir} already holds this run, finished; nothing to do")
    columns = ("prompt", "chosen", "rejected")
    trainer = CalibratedDPOTrainer(
        model=run.checkpoint.model,
        ref_model=run.reference,
        args=training_args,
        processing_class=run.checkpoint.tokenizer,
        train_dataset=Dataset.from_list([{name: getattr(pair, name) for name in columns} for pair in run.pairs]),
        peft_config=run.peft_config,
        data=run.data,
        weight_hash=run.checkpoint.weight_hash,
    )
    runs.train(trainer, run)


if __name__ == "__main__":
    runs.main(main, CalibratedDPOConfig)
