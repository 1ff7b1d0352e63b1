"""
Calibrated preference tuning: LoRA DPO on failing-test contexts with a penalty on the desperation reading.

```bash
accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/dpo.py \
    --config recipes/smollm2-135m/dpo.yaml
```

Run the same command again after a stop: it resumes from the last checkpoint.
"""

import sys
import warnings

from calibrate import corpora, models
from calibrate.training import runs
from calibrate.training.configs import CalibratedDPOConfig
from calibrate.training.trainers import CalibratedDPOTrainer


def main(training_args: CalibratedDPOConfig, model_args) -> None:
    from datasets import Dataset
    from trl import get_peft_config

    # PEFT looks the base model's vocabulary up on the Hub at every save, to see whether it was resized; it was not.
    warnings.filterwarnings("ignore", message="(Unable to fetch remote file|Could not find a config file)")

    twins = [twin for twin in corpora.load_twins(training_args.twins) if twin[0].split == "train"]
    twins = corpora.spread(twins, training_args.max_tasks)
    tasks = {failing.task for failing, _ in twins}
    pairs = [pair for pair in corpora.load_pairs(training_args.pairs) if pair.task in tasks]
    pairs = corpora.spread(pairs, training_args.max_pairs)
    dialogues = [dialogue for dialogue in corpora.load_neutral(training_args.neutral) if dialogue.split == "train"]
    stories = [story for story in corpora.load_stories(training_args.stories) if story.split == "train"]

    runs.refuse_unused(training_args, model_args)
    checkpoint = models.load(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    peft_config = get_peft_config(model_args)
    runs.keep_below_band(peft_config, training_args)
    resume_from = runs.claim(training_args, model_args, [twins, pairs, dialogues, stories, checkpoint.weight_hash])
    if resume_from == runs.FINISHED:
        return print(f"{training_args.output_dir} already holds this run, finished; nothing to do")

    trainer = CalibratedDPOTrainer(
        model=checkpoint.model,
        args=training_args,
        processing_class=checkpoint.tokenizer,
        train_dataset=Dataset.from_list([pair._asdict() for pair in pairs]),
        peft_config=peft_config,
        twins=twins,
        dialogues=dialogues,
        stories=stories,
        weight_hash=checkpoint.weight_hash,
    )
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model(training_args.output_dir)
    runs.finish(trainer)
    trainer.end()


if __name__ == "__main__":
    from trl import ModelConfig, TrlParser
    from yaml import YAMLError

    parser = TrlParser([CalibratedDPOConfig, ModelConfig])  # ty: ignore[invalid-argument-type]
    try:
        main(*parser.parse_args_and_config())  # ty: ignore[invalid-argument-type]
    except (ValueError, FileNotFoundError, YAMLError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")  # on one line
