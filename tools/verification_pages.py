"""The pages of tools/verification_cards.py, from the figures that it keeps. No check is run here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "models"
FIGURES = FOLDER / "checks.json"
COMMAND = "python tools/verification_cards.py"
SUFFIX = {"longctx": "its number of positions alone", "longctx_yarn": "with yarn"}


def write_pages() -> None:
    """Write the page of each model whose figures are kept."""
    for name, text in pages().items():
        (FOLDER / f"{name}.md").write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Return the pages by model."""
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    return {name: "\n".join([*_page(name, of), ""]) for name, of in figures.items()}


def _page(name: str, of: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {name}: what was checked"
    yield ""
    yield f"<!-- written by tools/verification_cards.py from {FIGURES.name} -->"
    yield (
        f"**A tiny model of this architecture with random weights** ({of['family']}: {of['shape']}), made by transformers' own class. "
        "No check here says anything of the published weights, of full size, or of speed."
    )
    yield ""
    yield "| check | result | negative control |"
    yield "|---|---|---|"
    for row in _rows(of):
        yield f"| {' | '.join(row)} |"
    versions = ", ".join(f"{package} {number}" for package, number in of["versions"].items())
    yield ""
    yield f"Run on a CPU with `{COMMAND}`, {of['date']}: {versions}; layouts over gloo."
    yield "The control is the same comparison with one value projection's rows in another order (of positions: with twice the rotary base). It must fail."
    yield ""
    yield f"**On a GPU:** {_device()}"


def _rows(of: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for dtype, trip in of["round_trip"].items():
        what = f"import, then export: the same bytes, {dtype}, {trip['num_files']} files of weights"
        yield what, "equal" if trip["is_equal"] else "**NOT EQUAL**", ""
    logits, control = of["logits"], of["control"]
    yield (
        f"`prism convert verify`: logits beside transformers, fp32, {logits['num_tokens']} tokens, tolerance {logits['tolerance']:.0e} of the largest logit",
        f"{_passed(logits['passed'])}: {_largest(logits)}",
        f"{_failed(not control['passed'])}: {control['relative_difference']:.1e}",
    )
    for layout, split in of["layouts"].items():
        what = f"{layout}, two ranks: log-probabilities beside transformers"
        if "refused" in split:
            yield what, f"refused: {split['refused']}", ""
        else:
            yield f"{what}, fp32, {split['num_tokens']} tokens", f"{split['max_abs_difference']:.1e} at most", f"{split['control']:.1e}"
    made = of["generation"]
    what = f"`prism generate --greedy`: transformers' text, {made['num_tokens']} tokens"
    yield what, "equal" if made["is_equal"] else "**NOT EQUAL**", _failed(not made["control_is_equal"])
    for recipe, turned in of["rotary"].items():
        yield _rotary(recipe, turned)


def _largest(logits: Mapping[str, Any]) -> str:
    if logits["max_abs_difference"] == 0:
        return "no bit differs"
    return f"{logits['relative_difference']:.1e} at most ({logits['max_abs_difference']:.1e} of {logits['max_abs_logit']:.3g})"


def _rotary(recipe: str, turned: Mapping[str, Any]) -> tuple[str, str, str]:
    what = f"extended to {turned['positions']:,} positions by `{recipe}.yaml` ({SUFFIX[recipe]}), verified"
    if not turned["has_rotary"]:
        return what, f"{_passed(turned['passed'])}; the model has no rotary positions", ""
    readers = f"transformers: {turned['rotary_transformers']}; a reader of transformers 4's kind: {turned['rotary_v4_reading']}"
    return what, f"{_passed(turned['passed'])}; frequencies in {readers}", _failed(turned["control"] != "same")


def _passed(is_so: bool) -> str:
    return "passed" if is_so else "**FAILED**"


def _failed(is_so: bool) -> str:
    return "seen" if is_so else "**NOT SEEN**"


def _device() -> str:
    """Return what a GPU has shown: the last run that docs/GPU.md has."""
    last = (ROOT / "docs" / "GPU.md").read_text(encoding="utf-8").partition("## The last run of the check\n")[2].strip()
    if not last or last.startswith("None yet"):
        return (
            "not run on a device. [GPU.md](../GPU.md) says what has not run there, by name, and [COMPATIBILITY.md](../COMPATIBILITY.md#what-ran-on-a-gpu) "
            "what an older layout of this code ran; `bash tools/gpu_check.sh` runs parity of each family."
        )
    return f"{last.splitlines()[0]} ([GPU.md](../GPU.md#the-last-run-of-the-check))"
