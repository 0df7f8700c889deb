"""Write what studies of one config say of its claims into docs/REPRODUCE.md: python tools/claims_table.py runs/tiny runs/tiny2 runs/tiny3

Without a study the table says that nothing is measured yet. A study is the run_dir of `prism study`; several are its seeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from generated import ROOT, write

DOCUMENT, TOOL = ROOT / "docs" / "REPRODUCE.md", Path(__file__).name
RECORD = Path("study") / "study.json"
NONE = "Not measured yet."


def table(studies: Sequence[Mapping[str, Any]]) -> str:
    """Return a line a claim: its state in each study, and the means of its figures over them. studies: study.json of each."""
    if not studies:
        return NONE
    names = [study["run_dir"] for study in studies]
    lines = [f"| claim | {' | '.join(names)} | figures, in the mean of the studies that have them |", f"|---|{'---|' * len(names)}---|"]
    for number, claim in enumerate(studies[0]["claims"]):
        of_each = [study["claims"][number] for study in studies]
        if any(one["name"] != claim["name"] for one in of_each):
            raise SystemExit(f"{claim['name']}: not the same claims in all of {', '.join(names)}")
        figures = "; ".join(f"`{figure}` {_mean([one['figures'].get(figure) for one in of_each])}" for figure in claim["figures"])
        lines.append(f"| `{claim['name']}` | {' | '.join(one['state'] for one in of_each)} | {figures.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    return f"{fmean(there):.3g}" if there else "not measured"


def main() -> None:
    write(DOCUMENT, TOOL, table([json.loads((Path(place) / RECORD).read_text()) for place in sys.argv[1:]]))


if __name__ == "__main__":
    main()
