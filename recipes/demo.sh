#!/bin/sh
# The main job on the default model, command by command: measure, train two arms, measure again, compare.
# Every step is skipped when its output is there already, so the same command goes on after a stop.
set -eu
cd "$(dirname "$0")/.."
RUN=runs/demo
CONFIG=recipes/smollm2-135m/dpo.yaml
# Directions of desperate against 23 other concepts: all 171 take five times as long.
CONCEPTS="desperate afraid angry anxious ashamed calm content bored disgusted embarrassed excited frustrated gloomy \
grateful guilty happy hopeful jealous lonely nostalgic panicked proud sad surprised"
EXTRACT="--splits audit --reference default --concepts $CONCEPTS"
AUDIT="--max-tasks 12 --max-pairs-per-task 1"

step() { printf '\n== %s\n' "$*"; }

step "1. Profile the model before, with the vectors that ship for it and its own from the audit's stories"
calibrate extract default --out $RUN/vectors-before $EXTRACT
calibrate audit default $AUDIT --own-vectors $RUN/vectors-before/audit --out $RUN/before

for arm in hinge-refit random; do
    step "2. Calibrate: LoRA DPO with the hinge, arm $arm"
    accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/dpo.py --config $CONFIG \
        --arm $arm --output_dir $RUN/$arm
    step "3. Re-extract from the tuned model and profile it again, arm $arm"
    calibrate extract $RUN/$arm --out $RUN/vectors-$arm $EXTRACT
    calibrate audit $RUN/$arm $AUDIT --own-vectors $RUN/vectors-$arm/audit --out $RUN/after-$arm
done

step "4. Compare before with after, beside the control arm"
calibrate compare $RUN/before $RUN/after-hinge-refit --control $RUN/after-random --out $RUN/report
