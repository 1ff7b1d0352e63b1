"""Puts extracted vectors of the default model into this package: `python -m calibrate.default_vectors FOLDER`."""

import argparse
import sys
from pathlib import Path

from calibrate import extraction, formats, geometry
from calibrate.vectors import SHIPPED, load_vectors

LIMIT = 6_000_000  # bytes; the package stays light


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder that `calibrate extract default` wrote")
    parser.add_argument("--map", type=Path, default=Path("docs/concept_map.png"), help="picture to draw")
    arguments = parser.parse_args()
    try:
        replace(arguments.source, arguments.map)
    except ValueError as error:
        sys.exit(f"error: {error}")


def replace(source: Path, picture: Path) -> None:
    """Ships the vectors of `source` at the layers that are read or pressed and those above, and draws the map.

    Raises:
        ValueError: `source` lacks vectors, or they are too large for the package.
    """
    vectors = load_vectors(str(source / "train"))
    later = extraction.later_layers(vectors.depth)
    formats.export_folder(
        vectors, sorted({*vectors.used_band(), *vectors.reading_layers(), *later}), SHIPPED / "train", half=True
    )
    size = sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file())
    if size > LIMIT:
        raise ValueError(
            f"{size:,} bytes in {SHIPPED}; the package takes {LIMIT:,}: take the old ones from git, and extract with "
            "a narrower band or fewer layers for reading"
        )
    train = load_vectors("default")
    at = train.positions(train.reading_layers())
    found = geometry.axes(train.directions[:, at].mean(1), train.concepts)
    title = f"171 emotion directions of SmolLM2-135M-Instruct, layers {', '.join(map(str, train.reading_layers()))}"
    geometry.plot_map(found, train.concepts, picture, title)


if __name__ == "__main__":
    main()
