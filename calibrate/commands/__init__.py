"""What the verbs of the `calibrate` command do; here what they share."""

import argparse
import hashlib
import json
from pathlib import Path

from calibrate import transcripts


def load(arguments: argparse.Namespace):
    from calibrate import models

    checkpoint = models.load(
        arguments.model,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
        chat_template=arguments.chat_template,
        block_list=arguments.blocks,
    )
    check_finite(checkpoint)
    return checkpoint


def check_finite(checkpoint) -> None:
    """Raises ValueError where a weight is not a finite number, and names its tensor."""
    for parameter, tensor in checkpoint.model.named_parameters():
        if tensor.is_floating_point() and tensor.itemsize == 1:  # float8 has no `isfinite`
            tensor = tensor.float()
        if not tensor.isfinite().all():
            raise ValueError(
                f"{checkpoint.name}: the tensor {parameter!r} holds values that are not finite; the checkpoint is "
                "damaged: save or download it again"
            )


def identity(checkpoint) -> dict:
    """What tells one checkpoint from another, a folder whose weights were replaced included."""
    return {
        "model": checkpoint.name,
        "weight_hash": checkpoint.weight_hash,
        "adapter": checkpoint.adapter_hash,
        "chat_template": digest(checkpoint.tokenizer.chat_template),
        **({"plain_roles": list(plain)} if (plain := transcripts.plain_roles(checkpoint.tokenizer)) else {}),
    }


def check_splits(splits: list[str], stories: list, why: str = "") -> None:
    for split in splits:
        if split not in (found := {story.split for story in stories}):
            raise ValueError(f"no stories of split {split!r}; the file has {', '.join(sorted(found))}{why}")


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def read_json(path: Path) -> dict:
    """What a result's file holds.

    Raises:
        ValueError: it is empty or cut off, or no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); the file is damaged: make the result again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object; the file is damaged: make the result again")
    return found


def is_done(folder: Path, options: dict) -> bool:
    """True where the folder holds this very result.

    Raises:
        ValueError: it holds another one.
    """
    for name, key in (("audit.json", "options"), ("config.json", "recipe")):
        if (folder / name).is_file():
            kept = read_json(folder / name).get(key)
            if kept == json.loads(json.dumps(options)):
                return True
            differing = sorted(k for k in {*(kept or {}), *options} if (kept or {}).get(k) != options.get(k))
            raise ValueError(
                f"output folder {folder} holds a result with another configuration (differing: "
                f"{', '.join(differing)}); choose "
                "another `--out` or delete it"
            )
    if folder.exists():
        raise ValueError(f"output folder {folder} exists and holds no result of this command; choose another `--out`")
    return False
