"""The `curate` command: score text by the emotional regulation it models, then reweight, tag, filter and report."""

import argparse
import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

TOKENS = ("<|dysregulated|>", "<|mixed|>", "<|regulated|>")
SHOWN = 20  # lines of an error that are printed


def main() -> None:
    arguments = _parser().parse_args()
    level = logging.INFO if arguments.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    try:
        arguments.run(arguments)
    except ValueError as error:
        *lines, last = str(error).split("\n")
        for line in lines[:SHOWN]:
            print(f"error: {line}", file=sys.stderr)
        if len(lines) > SHOWN:
            print(f"error: and {len(lines) - SHOWN} such lines more", file=sys.stderr)
        sys.exit(f"error: {last}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="curate", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    talk = argparse.ArgumentParser(add_help=False)
    talk.add_argument("--verbose", action="store_true", help="say more")
    running = argparse.ArgumentParser(add_help=False, parents=[talk])
    running.add_argument("--out", type=Path, required=True, help="folder of the results; a stopped run goes on there")
    running.add_argument("--workers", type=int, help="shards in work at once (default: the config's, or 1)")
    running.add_argument("--config", type=Path, help="YAML: executor (local, slurm, ray), workers, and its section")
    said = "start over: remove what a run left in OUT (on Slurm without it when the tasks have ended)"
    running.add_argument("--fresh", action="store_true", help=said)
    scored = argparse.ArgumentParser(add_help=False, parents=[running])
    scored.add_argument("scores", type=Path, help="the folder that `curate score` wrote")
    _add_score(verbs, running)
    _add_reweight(verbs, scored)
    _add_tag(verbs, scored)
    _add_filter(verbs, scored)
    _add_report(verbs, talk)
    for verb, said in (("fit", "labelled passages -> a scorer of your own"), ("label", "labels from a teacher model")):
        six = verbs.add_parser(verb, parents=[talk], help=said)
        if verb in sys.argv[1:2]:  # they load torch
            getattr(import_module(f"data_curation.{verb}"), f"add_{verb}")(six)
    return parser


def _add_score(verbs, running: argparse.ArgumentParser) -> None:
    one = verbs.add_parser("score", parents=[running], help="a corpus -> scores in a parquet sidecar, keyed by id")
    one.add_argument("input", help="parquet, JSONL (.gz, .zst), a folder of them, a saved dataset, or a Hub id")
    one.add_argument("--tier", choices=("1", "2", "auto"), default="auto", help="words, a model, or both (default)")
    one.add_argument("--scorer", default="default", help="a folder that `curate fit` wrote (default: the shipped one)")
    one.add_argument("--model", help="the model that tier 2 reads with (default: that of the scorer)")
    one.add_argument("--text-column", default="text", help="(default: %(default)s)")
    one.add_argument("--id-column", help="column of unique ids (default: `id`; without one, file and row)")
    one.add_argument("--number-rows", action="store_true", help="take file and row for ids although there is `id`")
    one.add_argument("--split", help="of a Hub id (default: train) or of a saved DatasetDict (default: all)")
    one.add_argument("--max-characters", type=int, default=20_000_000, help="of one text (default: %(default)s)")
    one.add_argument("--set-aside", action="store_true", help="note rows that cannot be used, and go on without them")
    one.add_argument("--shard-mb", type=int, default=16, help="megabytes of a file that one task reads (default: 16)")
    one.set_defaults(run=score)


def _add_reweight(verbs, scored: argparse.ArgumentParser) -> None:
    two = verbs.add_parser("reweight", parents=[scored], help="weights that favour regulated text and keep the mix")
    two.add_argument("--beta", type=float, default=1.0, help="steepness in standard deviations (default: 1)")
    two.add_argument("--floor", type=float, default=0.25, help="least weight (default: 0.25)")
    two.add_argument("--cap", type=float, default=4.0, help="greatest weight (default: 4)")
    two.add_argument("--topic-column", help="column of the topic; without one, all documents are of one topic")
    two.add_argument("--format-column", help="column of the format or source")
    two.add_argument("--sample", action="store_true", help="write the documents too, in as many copies as they weigh")
    two.add_argument("--seed", type=int, default=0, help="of the fractional copies (default: 0)")
    two.set_defaults(run=reweight)


def _add_tag(verbs, scored: argparse.ArgumentParser) -> None:
    three = verbs.add_parser("tag", parents=[scored], help="control tokens before the text, in three bands")
    three.add_argument("--edges", nargs=2, type=float, default=(0.35, 0.65), help="of the bands (default: 0.35 0.65)")
    three.add_argument("--tokens", nargs=3, default=TOKENS, help=f"low, middle, high (default: {' '.join(TOKENS)})")
    three.add_argument("--drop-out", type=float, default=0.1, help="share left without a token (default: 0.1)")
    three.add_argument("--untagged", type=float, default=0.1, help="share for the end of training (default: 0.1)")
    three.add_argument("--seed", type=int, default=0, help="of both draws (default: 0)")
    three.set_defaults(run=tag)


def _add_filter(verbs, scored: argparse.ArgumentParser) -> None:
    four = verbs.add_parser("filter", parents=[scored], help="drop the low tail; what is dropped is written out")
    said = "drop where the upper end of the interval lies below (default: 0.35)"
    four.add_argument("--below", type=float, default=0.35, help=said)
    four.add_argument("--max-share", type=float, default=0.05, help="refuse to drop more than this (default: 0.05)")
    four.set_defaults(run=filter_)


def _add_report(verbs, talk: argparse.ArgumentParser) -> None:
    five = verbs.add_parser("report", parents=[talk], help="one HTML page and a dataset card")
    five.add_argument("scores", type=Path, help="the folder that `curate score` wrote")
    five.add_argument("results", nargs="*", type=Path, help="folders of `curate reweight`, `tag` or `filter`")
    five.add_argument("--out", type=Path, required=True, help="folder to write report.html and README.md to")
    five.add_argument("--group-columns", nargs="+", default=[], help="columns whose groups' keep rates are compared")
    five.add_argument("--threshold", type=float, help="parts kept from not kept (default: a filter's or the scorer's)")
    five.add_argument("--workers", type=int, default=1, help="shards read at once for the columns (default: 1)")
    five.set_defaults(run=report)


def _config(arguments: argparse.Namespace):
    from data_curation.pipeline import load_config

    return load_config(arguments.config, arguments.workers)


def _done(manifest: dict[str, Any] | None, arguments: argparse.Namespace, *shown: str) -> dict[str, Any] | None:
    """Prints the counts, or that Slurm has the work."""
    if manifest is None:
        same = "the same command without --fresh" if arguments.fresh else "the same command"
        print(f"Handed to Slurm. When its tasks have ended, {same} checks and completes the run.")
        return None
    figures = manifest["figures"]
    counts = ", ".join(f"{figures.get(name, 0):,} {name.replace('_', ' ')}" for name in shown)
    print(f"{figures['rows']:,} documents: {counts}" if counts else f"{figures['rows']:,} documents")
    print(f"Results: {arguments.out}")
    return figures


def score(arguments: argparse.Namespace) -> None:
    from data_curation import runs

    names = ("tier", "scorer", "model", "text_column", "id_column", "number_rows", "split", "max_characters")
    options = {name: getattr(arguments, name) for name in (*names, "set_aside", "shard_mb", "fresh")}
    done = runs.score(arguments.input, arguments.out, **options, config=_config(arguments))
    figures = _done(done, arguments, "set_aside")
    if figures and figures["set_aside"]:
        print(f"Set aside: {arguments.out / 'set_aside.jsonl'} names file, row and reason of each")


def reweight(arguments: argparse.Namespace) -> None:
    from data_curation import runs

    columns = {"topic": arguments.topic_column, "form": arguments.format_column}
    options = {name: getattr(arguments, name) for name in ("beta", "floor", "cap", "sample", "seed", "fresh")}
    shown = ("documents", "dropped") if arguments.sample else ()
    figures = _done(
        runs.reweight(arguments.scores, arguments.out, **options, **columns, config=_config(arguments)),
        arguments, *shown,
    )  # fmt: skip
    if not figures:
        return
    fit = figures["fit"]
    strata = [f"topic ({columns['topic'] or 'none named: all one'})", f"format ({columns['form'] or 'all one'})"]
    print(f"Balanced over {fit['cells']} cells of {', '.join(strata)} and length in quarters")
    if fit["scored"]:
        print(f"Shift of the mix, KL in nats: {fit['kl_before']:.2g} before balancing, {fit['kl_after']:.2g} after")
        print(f"Effective documents: {fit['effective_documents']:,.0f} ({fit['effective_share']:.1%})")


def tag(arguments: argparse.Namespace) -> None:
    from data_curation import runs

    options = {name: getattr(arguments, name) for name in ("drop_out", "untagged", "seed", "fresh")}
    edges, tokens = tuple(arguments.edges), tuple(arguments.tokens)
    done = runs.tag(arguments.scores, arguments.out, edges, tokens, **options, config=_config(arguments))
    figures = _done(done, arguments, "tagged", "cooldown")
    if figures and figures.get("holds_token"):
        print(f"Warning: {figures['holds_token']:,} texts hold one of the tokens already; choose others")


def filter_(arguments: argparse.Namespace) -> None:
    from data_curation import runs

    options = {"max_share": arguments.max_share, "fresh": arguments.fresh}
    done = runs.filter_tail(arguments.scores, arguments.out, arguments.below, **options, config=_config(arguments))
    _done(done, arguments, "kept", "dropped")


def report(arguments: argparse.Namespace) -> None:
    from data_curation import report as page
    from data_curation.pipeline import Config

    options = {"groups": tuple(arguments.group_columns), "threshold": arguments.threshold}
    page.write(arguments.scores, arguments.results, arguments.out, config=Config(workers=arguments.workers), **options)
    print(f"Report: {arguments.out / 'report.html'}")
    print(f"Dataset card: {arguments.out / 'README.md'}")


if __name__ == "__main__":
    main()
