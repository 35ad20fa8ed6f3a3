"""Tables of the pages, from benchmarks/results: what `make docs` (cog) runs between the marks in them.

show(pick("overhead"))
show(pick("real_base", rows={"FedIT, 1e-3": "FedIT (`gemma3-270m.yaml`)"}, columns=["loss", "MB"]))
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
_TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
# A spread of nothing, as of the bytes of three seeds.
_CONSTANT = re.compile(r" ± 0(\.0+)?%?$")


class Picked(NamedTuple):
    """Rows of a result, {title: cell}, the first of which names them; and what its file says of itself."""

    rows: list[dict[str, str]]
    about: str


def pick(
    result: str,
    rows: Iterable[str] | Mapping[str, str] = (),
    columns: Iterable[str] | Mapping[str, str] = (),
    of: int = 0,
    **where: tuple[str, ...],
) -> Picked:
    """Rows and columns of a table in `benchmarks/results/{result}.md`.

    Args:
        rows: their names, in the order shown, or {name there: name shown}; default: all.
        columns: their titles, but for the first, or {title there: title shown}; default: all.
        of: which of the file's tables.
        where: column -> cells; rows with other cells are left out.

    Raises:
        KeyError: the table lacks a row or a column.
    """
    text = (RESULTS / f"{result}.md").read_text()
    (first, *titles), *lines = _table(text, of)
    found: dict[str, list[dict[str, str]]] = {}
    name = ""
    for own, *cells in lines:
        name = own or name  # a line without a name belongs to the one above
        row = dict(zip(titles, cells, strict=True))
        if all(row[column] in allowed for column, allowed in where.items()):
            found.setdefault(name, []).append({first: own} | row)
    picked = []
    for there, shown in _renamed(rows or list(found)).items():
        found[there][0][first] = there
        for row in found[there]:
            cells = {title: row[column] for column, title in _renamed(columns or titles).items()}
            picked.append({first: row[first] and shown} | cells)
    return Picked(picked, _about(text, of))


def _renamed(names: Iterable[str] | Mapping[str, str]) -> dict[str, str]:
    return dict(names) if isinstance(names, Mapping) else {name: name for name in names}


def _table(text: str, of: int) -> list[list[str]]:
    """Cells of a table of a Markdown file, without the line under its titles."""
    lines = _TABLE.findall(text)[of].splitlines()
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return [cells[0], *cells[2:]]


def _about(text: str, of: int) -> str:
    """What stands below the table; of all but the last also what stands at the end: command, day and machine."""
    below = [part.strip() for part in _TABLE.split(text)[1:]]
    return "\n\n".join(dict.fromkeys(part for part in (below[of], below[-1]) if part))


def show(*picked: Picked) -> None:
    """Print the rows as one table, with the first one's columns, and below it what the results say of themselves."""
    rows = [row for each in picked for row in each.rows]
    first, *titles = rows[0]
    print(f"\n| {' | '.join([first, *titles])} |\n|---|{'---:|' * len(titles)}")
    for row in rows:
        cells = (_CONSTANT.sub("", row.get(title, "")) for title in titles)
        print(f"| {' | '.join([next(iter(row.values())), *cells])} |")
    print("", "\n\n".join(dict.fromkeys(each.about for each in picked)), "", sep="\n")
