"""The documents are true to the tree: links and anchors lead somewhere, and docs/ARCHITECTURE.md names every module in its room, and every folder of tests."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_prism"
LINK = re.compile(r"\]\(([^)\s]+)\)")
ROOM = re.compile(r"^(?:L\d|  ) (\w+)/ ", re.MULTILINE)
SAID_AS_ONE = ("core/config/", "core/check/", "report/sections/")  # folders whose files the map does not list


def tracked(pattern: str) -> list[Path]:
    """Return the repository's own files of a pattern."""
    listed = subprocess.run(["git", "ls-files", "--", pattern], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines()]


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def dead_links(text: str, folder: Path) -> list[str]:
    """Return the relative links of a document in a folder that lead nowhere."""
    dead = []
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        target = folder / path
        if link.startswith(("http://", "https://")):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8") if path else text)):
            dead.append(link)
    return dead


def rooms(text: str) -> dict[str, set[str]]:
    """Return the words that the map has for each room."""
    drawing = text.split("```")[1]
    starts = [*ROOM.finditer(drawing)]
    ends = [*(match.start() for match in starts[1:]), len(drawing)]
    return {match[1]: set(re.findall(r"\w+", drawing[match.end() : end])) for match, end in zip(starts, ends, strict=True)}


def untold(named: dict[str, set[str]]) -> list[str]:
    """Return the rooms and modules that the map does not name."""
    found = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} - set(named)
    for module in tracked("megatron_prism/*/**.py"):
        inner = module.relative_to(PACKAGE).as_posix()
        is_family = "\nARCHITECTURES = " in module.read_text(encoding="utf-8")  # "one file a family"
        if not module.stem.startswith("__") and not inner.startswith(SAID_AS_ONE) and not is_family:
            found |= {inner} if module.stem not in named.get(inner.split("/")[0], ()) else set()
    return sorted(found)


def test_every_link_and_anchor_leads_somewhere() -> None:
    dead = {str(path.relative_to(ROOT)): dead_links(path.read_text(encoding="utf-8"), path.parent) for path in tracked("*.md")}
    assert len(dead) > 30 and not {path: links for path, links in dead.items() if links}


@pytest.mark.parametrize("link", ["docs/TRAINING.md", "docs/TRAIN.md#no-such-heading", "#nowhere"])
def test_a_dead_link_is_seen(link: str) -> None:
    text = "# A heading\n\n[here](docs/TRAIN.md#the-run-folder) [there](#a-heading) [site](https://example.org/x)"
    assert dead_links(f"{text} [x]({link})", ROOT) == [link]


def test_the_map_names_every_module_in_its_room() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert untold(rooms(text)) == []
    assert untold(
        rooms(text.replace(" supervise ", " ").replace("merge/ ", "join/ "))
    ) == [  # a control: names that are taken out are missed
        "grade/sandbox/supervise.py",
        "merge",
        *sorted(path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / "merge").glob("[a-z]*.py")),
    ]


def test_the_map_names_no_module_that_is_not_there() -> None:
    named = re.findall(r"\w+/[\w/]+\.py", (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    places = [PACKAGE, ROOT]
    assert len(named) > 50 and not [name for name in named if not any((place / name).is_file() for place in places)]


def test_the_map_names_every_folder_of_tests() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert not [
        path.parent.name
        for path in tracked("tests/*/test_*.py")
        if path.parent.parent == ROOT / "tests" and f"{path.parent.name}/" not in text
    ]
