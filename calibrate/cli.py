"""The `calibrate` command: vectors, readings of texts, audits, comparisons, corpora."""

import argparse
import logging
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

from calibrate.concepts import TARGET

# Verb -> module below `calibrate.commands`, imported on use: `--help` loads neither torch nor transformers.
HOMES = {
    "extract": "vectors", "read": "vectors", "export": "vectors", "audit": "audit", "compare": "compare",
    "card": "card", "check": "corpus", "write": "corpus", "import": "corpus",
}  # fmt: skip
RECIPES = ("paper", "plain", "contrastive", "logistic", "random", "shuffled")  # described in calibrate/extraction.py


def main() -> None:
    words = sys.argv[1:]
    # `export` takes vectors first: what it exports besides, the card of a result, is a verb of its own.
    arguments = _parser().parse_args(words[1:] if words[:2] == ["export", "card"] else words)
    level = logging.INFO if arguments.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    verb = arguments.corpus_verb if arguments.verb == "corpus" else arguments.verb
    try:
        home = import_module(f"calibrate.commands.{HOMES[verb]}")
        getattr(home, "import_" if verb == "import" else verb)(arguments)
    except (ValueError, OSError) as error:  # a folder below a file, a full disk
        sys.exit(f"error: {error}")


class _Parser(argparse.ArgumentParser):
    """Ends with status 1 where options are wrong: 2 is a verdict of `calibrate compare`."""

    def error(self, message: str):
        self.print_usage(sys.stderr)
        self.exit(1, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="calibrate", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    talk = argparse.ArgumentParser(add_help=False)
    talk.add_argument("--verbose", action="store_true", help="say more")
    loading = argparse.ArgumentParser(add_help=False, parents=[talk])
    loading.add_argument("--chat-template", type=Path, help="Jinja file, for a tokenizer without a chat template")
    loading.add_argument("--revision", help="revision of a Hub id")
    loading.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    loading.add_argument("--blocks", help="dotted name of the list of blocks, for an unknown architecture")
    texts = argparse.ArgumentParser(add_help=False, parents=[loading])
    texts.add_argument("--target", default=TARGET, help="the target concept (default: %(default)s)")
    texts.add_argument("--neutral", type=Path, help="JSONL of neutral dialogues (default: the shipped ones)")
    twins_help = "JSONL of failing and passing contexts (default: the shipped ones)"
    texts.add_argument("--twins", type=Path, help=twins_help)
    reading = argparse.ArgumentParser(add_help=False, parents=[texts])
    reading.add_argument("model", help="Hub id, folder, PEFT adapter folder, or `default`")
    _add_extract(verbs, reading)
    _add_read_and_export(verbs, loading, talk)
    _add_audit(verbs, reading, texts)
    _add_corpus(verbs, talk)
    return parser


def _add_extract(verbs, reading: argparse.ArgumentParser) -> None:
    one = verbs.add_parser("extract", parents=[reading], help="stories -> vectors, a folder for each split and recipe")
    one.add_argument("--out", type=Path, required=True, help="folder to write")
    one.add_argument("--stories", type=Path, help="JSONL of stories (default: the shipped ones)")
    one.add_argument("--concepts", nargs="+", help="these concepts only; directions are relative to their mean")
    one.add_argument(
        "--splits", nargs="+", default=["train"], help="splits of topics to extract from (default: train)"
    )
    one.add_argument("--recipes", nargs="+", default=["paper"], choices=RECIPES, help="how (default: paper)")
    one.add_argument(
        "--deflection", nargs="?", const=True, help="also vectors of felt but not shown emotion (a JSONL, or shipped)"
    )
    one.add_argument(
        "--check", action="store_true", help="measure the vectors on the audit topics, print and store it"
    )
    one.add_argument("--seed", type=int, default=0, help="of the random and shuffled controls (default: 0)")
    one.add_argument("--layers", nargs="+", type=int, help="layers to store (default: 30 to 80 %% of depth)")
    one.add_argument("--reference", help="vectors of the reference, whose neutral text gives mu and sigma")
    one.add_argument(
        "--directions",
        type=Path,
        help="take directions from this safetensors file instead ([layers + 1, hidden] each)",
    )
    one.add_argument("--sae-rows", nargs="+", metavar="NAME=ROW", help="rows of an SAE decoder in that file")
    one.add_argument("--sae-tensor", default="W_dec", help="name of the decoder there (default: W_dec)")


def _add_read_and_export(verbs, loading: argparse.ArgumentParser, talk: argparse.ArgumentParser) -> None:
    read = verbs.add_parser("read", parents=[loading], help="readings of your own texts or transcripts")
    read.add_argument("vectors", help="folder, Hub id, or `default`")
    read.add_argument("texts", type=Path, help='JSONL of {"id", "text"} or {"id", "messages"}')
    read.add_argument("--out", type=Path, required=True, help="JSONL to write, with OUT.meta.json beside it")
    read.add_argument("--model", help="model to read with (default: that of the vectors)")
    read.add_argument("--layers", nargs="+", type=int, help="mean over these layers (default: the vectors' choice)")
    read.add_argument("--tokens", action="store_true", help="add readings of every token")
    export = verbs.add_parser("export", parents=[talk], help="vectors in another format")
    export.add_argument("vectors", help="folder, Hub id, or `default`")
    export.add_argument("--out", type=Path, required=True, help="file or folder to write")
    export.add_argument(
        "--format", choices=("gguf", "persona", "folder"), required=True,
        help="gguf: a control vector for each concept; persona: [layers + 1, hidden] tensors; folder: our own",
    )  # fmt: skip
    export.add_argument("--concepts", nargs="+", help="concepts to export as gguf (default: all)")
    export.add_argument("--hint", default="llama", help="llama.cpp's name of the architecture (default: %(default)s)")
    export.add_argument("--layers", nargs="+", type=int, help="layers to keep in the folder (default: all)")
    export.add_argument("--half", action="store_true", help="float16 in the folder")
    card = verbs.add_parser(
        "card", parents=[talk], prog="calibrate export card", help="(`export card`) a result's section of a model card"
    )
    card.add_argument("result", type=Path, help="folder that `calibrate audit` or `calibrate compare` wrote")
    card.add_argument("--out", type=Path, required=True, help="Markdown file to write")


def _dose(text: str) -> tuple[str, float]:
    concept, _, dose = text.rpartition("=")
    try:
        return concept, float(dose)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not CONCEPT=DOSE, such as calm=0.05") from error


def _arm(text: str) -> tuple[str, str]:
    name, _, model = text.partition("=")
    if not name or not model:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MODEL, such as none=runs/none")
    return name, model


def _count(text: str, least: int = 1) -> int:
    """Not 0, which would read as if the option were not given."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number of {least} or more; leave it out for the default"
        )
    return int(text)


def _auditing() -> argparse.ArgumentParser:
    """The options that `audit` and `compare` share."""
    auditing = argparse.ArgumentParser(add_help=False)
    auditing.add_argument(
        "--vectors", default="default", help="the reference's vectors, frozen (default: the shipped ones)"
    )
    auditing.add_argument(
        "--full", action="store_true",
        help="all tasks, conversations and stories; tasks played out, preferences, dose-response (hours on a CPU)",
    )  # fmt: skip
    auditing.add_argument("--pairs", type=Path, help="JSONL of preference pairs (default: the shipped ones)")
    auditing.add_argument("--stories", type=Path, help="JSONL of stories (default: the shipped ones)")
    auditing.add_argument("--chats", type=Path, help='your own chats to profile, JSONL of {"id", "messages"}')
    auditing.add_argument("--truncate", action="store_true", help="cut a chat that is too long at its beginning")
    auditing.add_argument(
        "--split", choices=("audit", "selection"), default="audit",
        help="selection: to choose settings by, so that the audit's tasks stay unseen (default: audit)",
    )  # fmt: skip
    auditing.add_argument(
        "--max-tasks", type=_count, help="audit so many evenly spaced tasks (default: 14, full: all)"
    )
    auditing.add_argument("--pressed", action="store_true", help="read the longer conversations of each task too")
    auditing.add_argument("--max-pairs-per-task", type=_count, help="so many pairs of a task (default: 1)")
    auditing.add_argument(
        "--max-rows",
        type=partial(_count, least=2),
        help="at most so many situations, passages, dialogues of each kind",
    )
    auditing.add_argument("--concepts", nargs="+", help="re-extract from all stories about these alone")
    auditing.add_argument("--max-concepts", type=_count, help="re-extract against one story each of so many concepts")
    auditing.add_argument(
        "--max-new-tokens", type=_count, help="`--full`: of one answer to a coding task (default: 400)"
    )
    auditing.add_argument(
        "--lm-eval", nargs="+", metavar="TASK", help="also run these tasks of lm-eval, by name or as a YAML file"
    )
    return auditing


def _add_audit(verbs, reading: argparse.ArgumentParser, texts: argparse.ArgumentParser) -> None:
    auditing = _auditing()
    two = verbs.add_parser("audit", parents=[reading, auditing], help="the emotional profile of a checkpoint")
    two.add_argument("--out", type=Path, help="folder to write (default: runs/audit-MODEL)")
    two.add_argument(
        "--steer", nargs="+", type=_dose, default=[], metavar="CONCEPT=DOSE",
        help="steer while reading: share of the residual norm that is added at the band, such as calm=0.05",
    )  # fmt: skip
    two.add_argument("--reference", help="the model before training, for the KL of a checkpoint without an adapter")
    two.set_defaults(reference_revision=None)
    two.add_argument(
        "--tasks",
        type=Path,
        help="instead: flag the prompts of this JSONL ({id, text} or {id, messages}) that read high",
    )
    three = verbs.add_parser("compare", parents=[texts, auditing], help="before against after: verdict and report")
    three.set_defaults(steer=[])  # a steered model is compared by its audit
    three.add_argument("before", help="the model before training: Hub id, folder, `default`, or its audit's folder")
    three.add_argument("after", help="the same of the model after training")
    three.add_argument(
        "--arms", nargs="+", default=[], type=_arm, metavar="NAME=MODEL",
        help="control arms, models or audits: none (no penalty), random (direction), ...",
    )  # fmt: skip
    three.add_argument(
        "--seeds",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="AFTER trained with other seeds: all must be calibrated",
    )
    three.add_argument(
        "--audits", type=Path, default=Path("runs/audits"), help="where audits are kept and found again"
    )
    three.add_argument("--out", type=Path, required=True, help="folder for the report")


def _add_corpus(verbs, talk: argparse.ArgumentParser) -> None:
    corpus = verbs.add_parser("corpus", help="check a corpus, write one with a model of your own, import transcripts")
    inner = corpus.add_subparsers(dest="corpus_verb", required=True)
    check = inner.add_parser("check", parents=[talk], help="counts, balance, leaks, near-duplicates, lengths, spans")
    for kind in ("stories", "neutral", "deflection", "ladders"):
        check.add_argument(f"--{kind}", type=Path, help=f"JSONL of {kind} (without any option: the shipped files)")
    write = inner.add_parser("write", parents=[talk], help="write stories with a model or a server; resumable")
    write.add_argument("--out", type=Path, required=True, help="folder to write")
    write.add_argument("--model", help="Hub id, folder, or `default`")
    write.add_argument("--server", help="base URL of an OpenAI-compatible server, such as http://localhost:8000/v1")
    write.add_argument("--server-model", help="the server's name of its model; the key comes from OPENAI_API_KEY")
    write.add_argument("--concurrency", type=int, default=1, help="requests in flight to the server (default: 1)")
    write.add_argument("--concepts", nargs="+", help="concepts (default: all 171)")
    write.add_argument("--topics", type=Path, help="text file, one topic a line (default: 100 shipped ones)")
    write.add_argument("--max-topics", type=int, help="the first so many topics only")
    write.add_argument("--per-cell", type=int, default=12, help="stories per concept and topic (default: 12)")
    write.add_argument("--per-request", type=int, default=4, help="stories asked for at once (default: 4)")
    write.add_argument("--seed", type=int, default=0)
    write.add_argument("--temperature", type=float, default=1.0)
    write.add_argument("--top-p", type=float, default=0.95)
    _add_import(inner, talk)


def _add_import(inner, talk: argparse.ArgumentParser) -> None:
    three = inner.add_parser(
        "import", parents=[talk], help="your agent transcripts -> failing contexts and their twins"
    )
    three.add_argument("files", nargs="+", type=Path, help="JSONL of OpenAI chats, or inspect logs as JSON")
    three.add_argument("--out", type=Path, required=True, help="JSONL to write, for `twins` of a recipe")
    three.add_argument("--model", help="whose chat template must take them: Hub id, folder, or `default`")
    three.add_argument("--chat-template", type=Path, help="Jinja file, for a tokenizer without a chat template")
    three.add_argument("--task-field", default="task", help="key of the task (default: %(default)s; in a log: its id)")
    three.add_argument("--status-field", help="key of the outcome (default: status; in a log: its only scorer)")
    three.add_argument("--failing", nargs="+", help="statuses that mean failing (default: failed, I, false, 0, ...)")
    three.add_argument("--passing", nargs="+", help="statuses that mean passing (default: passed, C, true, 1, ...)")
    three.add_argument("--reply", help="opening of the next turn that fits either outcome (default: a neutral one)")
    three.add_argument("--split", choices=("train", "selection", "audit"), default="train")


if __name__ == "__main__":
    main()
