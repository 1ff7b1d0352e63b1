"""Runs cases of calibrated training in one process group and saves the final weights; started by accelerate."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from pathlib import Path

from safetensors.torch import save_file
from transformers import TrainerCallback


def fsdp_on_cpu() -> None:
    """Lets accelerate use FSDP2 on CPUs, which it else runs as DDP without a word; for this test only."""
    import accelerate.state as state
    from accelerate.utils import DistributedType

    original = state.AcceleratorState.__init__

    def init(self, mixed_precision=None, cpu=False, **options):
        state.PartialState(cpu=True)
        if state.PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        original(self, mixed_precision, cpu, **options)

    state.AcceleratorState.__init__ = init


class Killed(TrainerCallback):
    """Ends the second process without a word after the first step."""

    def on_step_end(self, args, state, control, **_):
        if args.process_index == 1:
            os._exit(9)


def main() -> None:
    setup = json.loads(Path(sys.argv[1]).read_text())
    if setup["launcher"] == "fsdp2":
        fsdp_on_cpu()
    from cases import CASES, build

    done = {}
    for name in setup["cases"]:
        trainer = build(CASES[name], Path(setup["out"]) / setup["launcher"] / name, setup)
        accelerator = trainer.accelerator
        facts = {"processes": accelerator.num_processes, "type": accelerator.distributed_type.value}
        if setup.get("kill") == name:
            trainer.add_callback(Killed())
        resume = Path(setup["out"]) / setup["launcher"] / name / "checkpoint-1"
        trainer.train(resume_from_checkpoint=str(resume) if setup.get("resume") else None)
        weights = accelerator.get_state_dict(trainer.model_wrapped)  # collective: whole parameters on the main process
        if accelerator.is_main_process:
            wanted = {k.replace("module.", ""): v.detach().float().cpu().clone() for k, v in weights.items()}
            save_file(wanted, Path(setup["out"]) / f"{setup['launcher']}-{name}.safetensors")
            done[name] = facts | {"log": [row for row in trainer.state.log_history if "loss" in row]}
        accelerator.wait_for_everyone()
        accelerator.free_memory()
    if done:
        (Path(setup["out"]) / f"{setup['launcher']}.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main()
