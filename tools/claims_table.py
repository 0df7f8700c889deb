"""Print what studies of one config (seeds) say of its claims, as a table: python tools/claims_table.py runs/tiny1 runs/tiny2 runs/tiny3

python tools/claims_table.py --write runs/tiny1 ...    # puts it into docs/REPRODUCE.md instead

The figures are those of `prism study CONFIG --status --beside RUN_DIR`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from generated import ROOT, write

from megatron_prism.study.claims import over_seeds

DOCUMENT, TOOL = ROOT / "docs" / "REPRODUCE.md", Path(__file__).name
RECORD = Path("study") / "study.json"
HEAD = "| claim | holds in | else | figures: mean over the studies, its 95 % interval (Student's t), and each study's |\n|---|---|---|---|"


def table(of_studies: Sequence[Mapping[str, Any]]) -> str:
    """Return a line a claim: in how many studies it holds, its state in the others, its figures but its prerequisites'. of_studies: study.json of each."""
    judged = [study["claims"] for study in of_studies]
    return "\n".join([HEAD, *(_line(claim, _asked(claim["name"], judged)) for claim in over_seeds(judged))])


def _asked(name: str, judged: Sequence[Sequence[Mapping[str, Any]]]) -> set[str]:
    """Return the figures that a claim's `shows` and `null` name, in any of the studies."""
    claims = [claim for of_study in judged for claim in of_study if claim["name"] == name]
    checks = [check for claim in claims for check in claim["checks"] if check["part"] != "requires"]
    return {figure for check in checks for figure in (check["value"], check["than"]) if isinstance(figure, str)}


def _line(claim: Mapping[str, Any], asked: set[str]) -> str:
    others = "; ".join(dict.fromkeys(state for state in claim["states"] if state != "holds"))
    told = (f"`{name}` {_told(of)}" for name, of in claim["figures"].items() if name in asked)
    figures = "<br>".join(told).replace("|", r"\|")
    return f"| `{claim['name']}` | {claim['num_holds']} of {claim['num_studies']} | {others} | {figures} |"


def _told(figure: Mapping[str, Any]) -> str:
    if figure["mean"] is None:
        return "not measured"
    interval = f" ({figure['interval_95'][0]:.3g} to {figure['interval_95'][1]:.3g})" if figure["interval_95"] else ""
    each = ", ".join("none" if value is None else f"{value:.3g}" for value in figure["values"])
    return f"{figure['mean']:.3g}{interval}: {each}"


def studies(places: Sequence[Path]) -> list[Mapping[str, Any]]:
    """Return each place's study.json. Ends the process where a place is there twice, holds no study, or one of another name."""
    if absent := [str(place / RECORD) for place in places if not (place / RECORD).is_file()]:
        sys.exit(f"claims_table: {', '.join(absent)}: no such file; required folders of studies that have begun")
    read = [json.loads((place / RECORD).read_text(encoding="utf-8")) for place in places]
    if len({place.resolve() for place in places}) < len(places) or len({study["name"] for study in read}) > 1:
        sys.exit(f"claims_table: {', '.join(map(str, places))}: required folders of one study's seeds, each once")
    return read


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--write"]
    if not words or any(word.startswith("-") for word in words):
        sys.exit(__doc__)
    text = table(studies([Path(word) for word in words]))
    if "--write" in sys.argv:
        write(DOCUMENT, TOOL, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
