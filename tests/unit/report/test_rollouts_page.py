"""The page of a step's responses: hostile texts stay text, nothing is loaded, and what is long is cut and said so."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from megatron_prism.report import rollouts_page
from megatron_prism.report.rollouts_page import HEAD_CHARS, TAIL_CHARS, Group, Response, page

TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "fieldset", "legend", "label", "input"),
    *("details", "summary", "b", "span", "div", "section", "pre", "p"),
}
HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></details><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "</style><style>*{display:none}</style>",
    "<think>a</think><think><b>x</think></section><iframe src=//evil>",
    "&lt;script&gt; &#60;script&#62; &amp;",
    "<!-- <![CDATA[ ]]> --> <?php ?> <svg/onload=alert(1)>",
    "javascript:alert(1) http://evil.example/x.png",
]
UNPRINTABLE = {"\0": "\\x00", "\x1b[2J": "\\x1b[2J", "\u202eabc\u2066": "\\u202eabc\\u2066", "\ud800": "\\ud800", "\u2028": "\\u2028"}


class Reader(HTMLParser):
    """What a browser sees: the tags with their attributes, and the text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open and self.open[-1] != "style" else ""

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def response(text: str, **changes: object) -> Response:
    values = {"sample": 0, "outcome": "wrong", "why": "", "reward": 0.0, "ended": "end_token", "num_tokens": 3, "advantage": None}
    return Response(text=text, **{**values, **changes})  # type: ignore[arg-type]


def group(*responses: Response, **changes: str) -> Group:
    return Group(**{"id": "a1", "domain": "math", "prompt": "1 + 1 =", "gold": "2", **changes}, responses=responses)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_shown_and_is_nothing_else(text: str) -> None:
    everywhere = response(text, outcome=text, why=text, ended=text)
    written = page(text, [group(everywhere, id=text, domain=text, prompt=text, gold=text)])
    calm = Reader(page("t", [group(response("a</think>b" if "</think>" in text else "a", outcome="x", why="y"))]))
    seen = Reader(written)
    assert not seen.open and {tag for tag, _ in seen.tags} <= TAGS
    assert [tag for tag, _ in seen.tags] == [tag for tag, _ in calm.tags]  # the text has made no tag
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on") or name in ("src", "href", "style")]
    for part in text.removeprefix("<think>").split("</think>", 1) if "</think>" in text else [text]:
        assert part in seen.text
    assert seen.text.count(text) >= 6  # title, heading, outcome, domain, id, prompt, gold ...


def test_a_text_that_escapes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts_page, "escape", lambda text: text)
    assert "script" in {tag for tag, _ in Reader(page("t", [group(response(HOSTILE[0]))])).tags}


@pytest.mark.parametrize(("text", "shown"), UNPRINTABLE.items(), ids=ascii)
def test_what_is_not_printable_is_spelled_out(text: str, shown: str) -> None:
    written = page("t", [group(response(text))])
    assert shown in Reader(written).text and text not in written
    written.encode("utf-8")


def test_the_page_loads_and_runs_nothing() -> None:
    written = page("t", [group(response("a"))])
    tags = Reader(written).tags
    policy = next(attributes["content"] for tag, attributes in tags if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; style-src 'sha256-") and "script" not in policy
    assert "url(" not in written and "@import" not in written and "http://" not in written and "https://" not in written
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "a", "form"}


def test_a_megabyte_is_cut_and_said_so() -> None:
    text = "<think>" + "x" * 1_000_000 + "</think>" + "y" * 900_000 + "the end"
    written = page("t", [group(*[response(text, sample=number) for number in range(16)])])
    assert len(written) < 16 * 2 * (HEAD_CHARS + TAIL_CHARS + 1000) + 10_000
    seen = Reader(written).text
    assert f"{1_000_000 - HEAD_CHARS - TAIL_CHARS:,} characters are left out" in seen and "the end" in seen and "think, 1,000,000" in seen


def test_facts_and_choices() -> None:
    math = group(response("<think>1</think>2", outcome="right", reward=1.0, advantage=0.5), response("3", sample=1, why="'3' is not '2'"))
    code = group(response("", outcome="fault", reward=0.0), domain="code", id="b2")
    written = page("run, step 3", [math, code])
    text = Reader(written).text
    for said in ("1/2 right", "mean reward 0.500", "advantage +0.500", "not trained on", "'3' is not '2'", "gold 2", "think, 1 characters"):
        assert said in text, said
    assert "no reward" in text  # the mean of a group of faults
    ids = {attributes["id"] for tag, attributes in Reader(written).tags if tag == "input" and "id" in attributes}
    assert ids == {"outcome-0", "outcome-1", "outcome-2", "domain-0", "domain-1"}
    style = re.search("<style>(.*?)</style>", written, re.DOTALL)
    assert style is not None
    for name in ids:  # what is chosen hides all others
        assert f"body:has(#{name}:checked) .group:not(.{name})" in style[1]
    marks = [
        attributes["class"] for tag, attributes in Reader(written).tags if tag == "details" and "group" in (attributes.get("class") or "")
    ]
    assert marks == ["group domain-1 outcome-1 outcome-2", "group domain-0 outcome-0"]
