#!/bin/sh
# The main job on the default model, command by command: measure, train three arms, measure again, compare.
# Every step is skipped when its output is there already, so the same command goes on after a stop.
set -eu
cd "$(dirname "$0")/.."
RUN=runs/demo
CONFIG=recipes/smollm2-135m/dpo-small.yaml
AUDIT="--max-tasks 12 --max-concepts 43"

step() { printf '\n== %s\n' "$*"; }

step "1. Profile the model before, with the vectors that ship for it and its own from the audit's stories"
calibrate audit default $AUDIT --out $RUN/before

for arm in hinge-refit random none; do
    step "2. Calibrate: LoRA DPO with the hinge, arm $arm"
    accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/dpo.py --config $CONFIG \
        --arm $arm --output_dir $RUN/$arm
    step "3. Profile the tuned model, its own directions made anew, arm $arm"
    calibrate audit $RUN/$arm $AUDIT --out $RUN/after-$arm
done

step "4. Compare before with after, beside the control arms; exit status 2 is a verdict other than calibrated"
calibrate compare $RUN/before $RUN/after-hinge-refit --arms random=$RUN/after-random none=$RUN/after-none \
    --out $RUN/report || [ $? -eq 2 ]
