"""The pages of tools/verification_cards.py: one for each of the seven models, as the figures that are kept make it, and none that hides a failure."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TOOL = runpy.run_path(str(ROOT / "tools" / "verification_pages.py"))
SEVEN = {path.stem for path in (ROOT / "configs" / "models").glob("*.yaml")} - {"qwen2.5-7b"}


def test_the_pages_are_those_of_their_figures() -> None:
    pages = TOOL["pages"]()
    assert set(pages) == SEVEN == {path.stem for path in TOOL["FOLDER"].glob("*.md")}
    for name, text in pages.items():
        assert (TOOL["FOLDER"] / f"{name}.md").read_text(encoding="utf-8") == text, "run tools/verification_cards.py --only-pages"
        assert "tiny model of this architecture with random weights" in text and "**NOT" not in text and "**FAILED" not in text


def test_a_failure_and_a_control_that_was_not_seen_stand_on_the_page() -> None:
    figures = json.loads(TOOL["FIGURES"].read_text(encoding="utf-8"))["llama-3.1-8b"]
    for place, value, said in (
        (("logits", "passed"), False, "**FAILED**"),
        (("control", "passed"), True, "**NOT SEEN**"),
        (("generation", "is_equal"), False, "**NOT EQUAL**"),
        (("generation", "control_is_equal"), True, "**NOT SEEN**"),
        (("round_trip", "fp32", "is_equal"), False, "**NOT EQUAL**"),
        (("rotary", "longctx", "control"), "same", "**NOT SEEN**"),
    ):
        changed = copy.deepcopy(figures)
        part = changed
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = value
        assert said in "\n".join(TOOL["_page"]("a", changed))
