"""The figure of a mixture: what its bars and rings measure, that nothing overlaps, and that no name steers it."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.errors import BackendMissing
from megatron_prism.report import blend
from megatron_prism.report.blend import BlendPart

pytest.importorskip("matplotlib")
PAPER = {  # Math + Code + Science: domain, weight, billions of tokens that it has
    "megamath_web_pro": ("math", 20, 14.73),
    "mot_math": ("math", 7, 0.6),
    "nemotron_pt_v1_math": ("math", 10, 35.93),
    "chat": ("general", 5, 0.91),
    "dclm_edu": ("general", 5, 111.46),
    "starcoder2": ("code", 13.75, 432.73),
    "refinecode": ("code", 13.75, 186.44),
    "opencodereasoning_2": ("code", 10, 1.12),
    "mot_code": ("code", 3, 1.18),
    "openthoughts3_science": ("science", 7.75, 0.73),
    "mot_science": ("science", 4.75, 0.42),
}
HOSTILE = [
    "$x^{2}$",
    "$\\frac{",
    "`tick`",
    "a\nb\x1b[31m\x00",
    "\u202ertl\u2028",
    "\u65e5\u672c",
    "n" * 300,
    "",
    "<b>&amp;",
    "%s{0}",
    "-" * 40,
    "W" * 60,
]


def paper() -> list[BlendPart]:
    return [
        BlendPart(name, domain, weight / 100, round(weight * 262_144_000), weight * 0.262144 / has)
        for name, (domain, weight, has) in PAPER.items()
    ]


def many(count: int, share: Any) -> list[BlendPart]:
    """Return sources of long and wide names, over as many domains as have a colour and more, with shares in some proportion."""
    total = sum(map(share, range(count)))
    domains = ["math", "code", "science", "general", None, "law", "medicine", "history", "M" * 40]
    names = [f"{'W' * 30}_{index}_{'m' * 30}" for index in range(count)]
    return [
        BlendPart(name, domains[index % len(domains)], share(index) / total, 888_888_888_888, 888.8) for index, name in enumerate(names)
    ]


def wedges(figure: Any) -> tuple[list[Any], list[Any]]:
    """Return the wedges of the outer and of the inner ring."""
    both = [patch for patch in figure.axes[1].patches if type(patch).__name__ == "Wedge"]
    radii = sorted({wedge.r for wedge in both})
    assert len(radii) == 2
    return [wedge for wedge in both if wedge.r == radii[1]], [wedge for wedge in both if wedge.r == radii[0]]


def turn(wedge: Any) -> float:
    return (wedge.theta2 - wedge.theta1) / 360


def texts(figure: Any) -> list[Any]:
    import matplotlib.text

    figure.draw_without_rendering()
    return [text for text in figure.findobj(matplotlib.text.Text) if text.get_visible() and text.get_text()]


def test_a_bar_is_as_long_as_its_share_and_the_largest_is_on_top() -> None:
    axes = blend.figure(paper(), "MCS").axes[0]
    bars = dict(zip([label.get_text() for label in axes.get_yticklabels()], axes.patches, strict=True))
    assert {name: bar.get_width() for name, bar in bars.items()} == pytest.approx({name: weight for name, (_, weight, _) in PAPER.items()})
    lowest_first = sorted(bars.values(), key=lambda bar: axes.transData.transform((0, bar.get_y()))[1])
    assert [bar.get_width() for bar in lowest_first] == sorted(bar.get_width() for bar in bars.values())


def test_a_source_read_more_than_once_is_marked() -> None:
    axes = blend.figure(paper(), "MCS").axes[0]
    hatched = {label.get_text() for label, bar in zip(axes.get_yticklabels(), axes.patches, strict=True) if bar.get_hatch()}
    again = {part.name for part in paper() if part.epochs is not None and part.epochs > 1}
    assert hatched == again == {"mot_math", "chat", "opencodereasoning_2", "openthoughts3_science", "mot_science"}
    assert "hatched" in axes.get_xlabel()
    once = blend.figure([BlendPart("a", None, 1.0, 10, 1.0)], "")
    assert not once.axes[0].patches[0].get_hatch() and "hatched" not in once.axes[0].get_xlabel()


def test_the_numbers_stand_at_the_bars_and_the_domains_beside_the_ring() -> None:
    figure = blend.figure(paper(), "MCS")
    shown = {text.get_text() for text in texts(figure)}
    assert {"13.75 %  3.6 B tokens  0.00833 epochs", "20 %  5.24 B tokens  0.356 epochs", "MCS"} <= shown
    domains = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert domains == ["code  40.5 %", "math  37 %", "science  12.5 %", "general  10 %"]
    unknown = [text.get_text() for text in texts(blend.figure([BlendPart("a", None, 1.0, None, None)], "")) if text.axes]
    assert not [text for text in unknown if "token" in text.replace("training tokens", "") or "epoch" in text]


def test_the_rings_turn_by_share_and_a_source_lies_over_its_domain() -> None:
    outer, inner = wedges(blend.figure(paper(), "MCS"))
    assert [turn(wedge) for wedge in inner] == pytest.approx([0.405, 0.37, 0.125, 0.1])
    assert inner[0].theta2 == pytest.approx(90) and inner[1].theta2 == pytest.approx(inner[0].theta1)  # clockwise from the top
    assert sorted(map(turn, outer)) == pytest.approx(sorted(part.share for part in paper()))
    for wedge in outer:
        middle = (wedge.theta1 + wedge.theta2) / 2
        (below,) = [one for one in inner if one.theta1 <= middle <= one.theta2]
        assert below.theta1 - 1e-3 <= wedge.theta1 and wedge.theta2 <= below.theta2 + 1e-3


@pytest.mark.parametrize(
    ("weights", "domains"),
    [
        ({"megamath_web_pro": 55, "dclm_edu": 15, "mot_math": 10, "nemotron_pt_v1_math": 10, "chat": 10}, {"math": 0.75, "general": 0.25}),
        (
            {
                "megamath_web_pro": 27.5,
                "mot_math": 10,
                "nemotron_pt_v1_math": 10,
                "chat": 5,
                "dclm_edu": 5,
                "starcoder2": 13.75,
                "refinecode": 13.75,
                "opencodereasoning_2": 10,
                "mot_code": 5,
            },
            {"math": 0.475, "code": 0.425, "general": 0.1},
        ),
        ({name: weight for name, (_, weight, _) in PAPER.items()}, {"code": 0.405, "math": 0.37, "science": 0.125, "general": 0.1}),
    ],
)
def test_domains_sum_to_the_papers_rings(weights: dict[str, float], domains: dict[str, float]) -> None:
    shares = blend.domain_shares([BlendPart(name, PAPER[name][0], weight / 100, None, None) for name, weight in weights.items()])
    assert shares == pytest.approx(domains) and list(shares) == list(domains)


def test_no_domain_is_other() -> None:
    parts = [BlendPart("a", None, 0.5, None, None), BlendPart("b", "other", 0.25, None, None), BlendPart("c", "math", 0.25, None, None)]
    assert blend.domain_shares(parts) == {"other": 0.75, "math": 0.25}


def test_a_domain_has_its_colour_in_every_figure_and_a_source_a_tint_of_it() -> None:
    def inner_colours(parts: list[BlendPart]) -> dict[str, Any]:
        return {
            name: wedge.get_facecolor() for name, wedge in zip(blend.domain_shares(parts), wedges(blend.figure(parts, ""))[1], strict=True)
        }

    whole, alone = inner_colours(paper()), inner_colours([BlendPart("a", "science", 1.0, None, None)])
    assert whole["science"] == alone["science"] and len(set(whole.values())) == 4
    crowd = inner_colours(many(20, lambda index: 1))
    assert len(set(crowd.values())) >= 8
    figure = blend.figure(paper(), "")
    bars, (outer, _) = figure.axes[0].patches, wedges(figure)
    assert sorted(bar.get_facecolor() for bar in bars) == sorted(wedge.get_facecolor() for wedge in outer)
    assert len({bar.get_facecolor() for bar in bars}) == len(PAPER)
    colour_of = dict(
        zip([label.get_text() for label in figure.axes[0].get_yticklabels()], [bar.get_facecolor() for bar in bars], strict=True)
    )
    largest = {"math": "megamath_web_pro", "code": "starcoder2", "science": "openthoughts3_science", "general": "chat"}
    assert {domain: colour_of[name] for domain, name in largest.items()} == whole  # a domain's largest source has its very colour


CROWDS = {
    "paper": paper(),
    "one": [BlendPart("a", None, 1.0, 10, 0.5)],
    "even": many(20, lambda index: 1),
    "halves": many(20, lambda index: 0.5**index),
    "one and crumbs": many(20, lambda index: 80 if index == 0 else 1),
    "two": many(2, lambda index: 1),
    "seven": many(7, lambda index: index + 1),
    "many domains": [BlendPart(name, name, 1 / 20, 10, 1.5) for name in "abcdefghijklmnopqrst"],
    "wide domains": [BlendPart(name, name + "W" * 40, 1 / 12, 10, 1.5) for name in "abcdefghijkl"],
}


@pytest.mark.parametrize("name", CROWDS)
def test_no_text_overlaps_another_or_leaves_the_figure(name: str) -> None:
    figure = blend.figure(CROWDS[name], "t" * 300)
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    assert len(boxes) > 5
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, (text, box)
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert min(a.x1, b.x1) <= max(a.x0, b.x0) or min(a.y1, b.y1) - max(a.y0, b.y0) < 2, (one, other)  # an extent has its line's leading


def test_the_files_are_a_png_and_an_svg_and_the_same_again(tmp_path: Path) -> None:
    png, svg = blend.draw(paper(), "MCS", tmp_path / "a" / "b")
    assert (png, svg) == (tmp_path / "a" / "b" / "blend.png", tmp_path / "a" / "b" / "blend.svg")
    import matplotlib.image

    height, width = matplotlib.image.imread(png).shape[:2]
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and width > 2000 and height > 600
    assert ElementTree.parse(svg).getroot().tag.endswith("}svg")
    assert b"<dc:date>" not in svg.read_bytes()
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import matplotlib; matplotlib.rcParams.update({'font.size': 30, "
        "'axes.facecolor': 'red'}); import importlib.util as u; s = u.spec_from_file_location('t', sys.argv[2]); t = u.module_from_spec(s); "
        "s.loader.exec_module(t); t.blend.draw(t.paper(), 'MCS', Path(sys.argv[3]))"
    )
    root = Path(blend.__file__).resolve().parents[2]
    # another process, another matplotlibrc
    subprocess.run([sys.executable, "-c", code, str(root), __file__, str(tmp_path / "c")], check=True)
    assert [(tmp_path / "c" / path.name).read_bytes() for path in (png, svg)] == [png.read_bytes(), svg.read_bytes()]


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 31}):
        before = dict(matplotlib.rcParams)
        blend.draw(paper(), "MCS", tmp_path)
        assert dict(matplotlib.rcParams) == before
    done = subprocess.run(
        [sys.executable, "-c", "import sys; import megatron_prism.report.blend; print('matplotlib' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(blend.__file__).resolve().parents[2],
    )
    assert done.stdout.strip() == "False"


def test_no_pyplot_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert all(path.stat().st_size for path in blend.draw(paper(), "MCS", tmp_path))


def test_without_matplotlib_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendMissing, match="matplotlib is not installed"):
        blend.draw(paper(), "MCS", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("error")  # a glyph that the font lacks is a warning
def test_hostile_names_are_drawn_as_they_are_spelled(tmp_path: Path) -> None:
    parts = [BlendPart(name, name[:20], 1 / len(HOSTILE), 10, 2.0) for name in HOSTILE]
    figure = blend.figure(parts, "".join(HOSTILE))
    drawn = [text.get_text() for text in texts(figure)]
    assert "$x^{2}$" in drawn and r"a\nb\x1b[31m\x00" in drawn and "\\u65e5\\u672c" in drawn
    assert all(text.isprintable() for text in drawn)
    assert not any(text.get_parse_math() for text in texts(figure) if "$" in text.get_text())
    _, svg = blend.draw(parts, "".join(HOSTILE), tmp_path)
    ElementTree.parse(svg)


def test_math_is_not_read_into_a_domain() -> None:
    figure = blend.figure([BlendPart("a", "$\\frac{", 1.0, 1, 1.0)], "$\\frac{")
    assert any(text.get_text().startswith("$\\frac{  100") for text in texts(figure))
    assert math.isclose(turn(wedges(figure)[1][0]), 1, abs_tol=1e-6)
