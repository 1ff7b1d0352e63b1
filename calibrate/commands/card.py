"""`calibrate export card`: the model card section of an audit or of a comparison."""

import argparse
import os

from calibrate.commands import read_json


def card(arguments: argparse.Namespace) -> None:
    """Writes the section as Markdown."""
    from calibrate import report
    from calibrate.audit.record import load_record

    folder, out = arguments.result, arguments.out
    if out.exists():
        raise ValueError(f"{out} exists; choose another `--out` or delete it")
    if (folder / "report.json").is_file():
        data = read_json(folder / "report.json")
        if data.get("schema") != report.SCHEMA:
            raise ValueError(
                f"{folder / 'report.json'}: schema {data.get('schema')}, this version reads {report.SCHEMA}; run "
                "`calibrate compare` again"
            )
        text = report.card(data)
    elif (folder / "audit.json").is_file():
        text = report.profile_card(load_record(folder))
    else:
        raise ValueError(
            f"{folder}: neither report.json nor audit.json there; give the folder that `calibrate compare` or "
            "`calibrate audit` wrote"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, out)
    print(f"{out}: written")
