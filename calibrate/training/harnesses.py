"""The training contexts as other agents' harnesses would show them, so that what is learnt is tied to no one format.

The shipped contexts of the train split are written in one format: files in a fence, results of tools as they came. The
audit's are in others, which are none of these.
"""

import json
import re

from calibrate.corpora import Context

Twins = list[tuple[Context, Context]]
_FILE = re.compile(r"```\w*\n# (?P<name>\S+)\n(?P<code>.*?)\n```", re.DOTALL)


def varied(twins: Twins) -> Twins:
    """The twins, each task's in one of four harnesses in turn: as they are, as calls in JSON, in brackets, in a shell.

    What is said, the code and the results stay what they were, and a passing twin is shown as its failing context is.

    Raises:
        ValueError: nothing would change: one task alone, which stays as it is, or no context of another one has a file
            (a fence whose first line is `# NAME`) or the result of a tool.
    """
    tasks = {task: number for number, task in enumerate(dict.fromkeys(failing.task for failing, _ in twins))}
    found = [
        (_shown(failing, tasks[failing.task] % 4), _shown(passing, tasks[failing.task] % 4))
        for failing, passing in twins
    ]
    if found == twins:
        raise ValueError(
            f"`vary_harness` is true, but changes none of {len(tasks)} tasks: it needs two or more, with files (a "
            "fence whose first line is `# NAME`) or messages with the role `tool`; leave it out"
        )
    return found


def _shown(context: Context, harness: int) -> Context:
    return context._replace(messages=[_message(message, harness) for message in context.messages])


def _message(message: dict[str, str], harness: int) -> dict[str, str]:
    role, text = message["role"], message["content"]
    if role == "tool":
        text = (text, json.dumps({"output": text}), f"[stdout]\n{text}\n[/stdout]", f"$ check\n{text}\n$")[harness]
    elif role == "assistant" and harness:
        text = _FILE.sub(lambda file: _written(file["name"], file["code"], harness), text)
    return {"role": role, "content": text}


def _written(name: str, code: str, harness: int) -> str:
    if harness == 1:
        return json.dumps({"call": "write_file", "path": name, "text": code + "\n"})
    return f"[write {name}]\n{code}\n[/write]" if harness == 2 else f"$ cat > {name} << 'EOF'\n{code}\nEOF"
