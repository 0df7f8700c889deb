"""A step's responses as one HTML page: by prompt, with outcome, reward and text. It loads nothing and runs nothing: no script, no network.

What a model writes is hostile: all of it is escaped, what is not printable is spelled out, and the page's policy (CSP) lets no script run and
no address be fetched, should a text escape us. The choice of outcome and domain is made by CSS alone.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from megatron_prism.core.errors import printable
from megatron_prism.grade.format import CLOSE, OPEN
from megatron_prism.grade.outcome import OUTCOMES

HEAD_CHARS, TAIL_CHARS = 4000, 2000  # of a text that is shown in part
STYLE = """
:root{color-scheme:light dark;--back:#fff;--fore:#1c1e21;--soft:#667;--line:#d5d8de;--card:#f5f6f8}
@media(prefers-color-scheme:dark){:root{--back:#15171a;--fore:#e4e6ea;--soft:#98a;--line:#353941;--card:#1e2126}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:.75rem;background:var(--back);color:var(--fore);font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.3rem;margin:.2rem 0}
fieldset{border:0;padding:.2rem 0;margin:0;display:flex;flex-wrap:wrap;gap:.3rem .9rem}
legend,.soft{color:var(--soft)}legend{float:left;padding:0;min-width:4.5rem}
label{white-space:nowrap}
.group{border:1px solid var(--line);border-radius:.5rem;margin:.5rem 0;padding:.4rem .6rem}
.response{background:var(--card);border-left:.3rem solid var(--line);border-radius:.3rem;margin:.5rem 0;padding:.4rem .6rem}
.facts{display:flex;flex-wrap:wrap;gap:.1rem .9rem}
summary{cursor:pointer}
pre{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;margin:.3rem 0;font:13px/1.4 ui-monospace,monospace}
.right{border-left-color:#2a9d5c}.wrong{border-left-color:#d1495b}.no_format{border-left-color:#e0a526}.truncated{border-left-color:#8d6cc9}
.fault{border-left-color:#7a7f87}
"""


@dataclass(frozen=True)
class Response:
    """A response as it is shown. advantage: None where it is not trained on."""

    sample: int
    text: str
    outcome: str
    why: str
    reward: float
    ended: str
    num_tokens: int
    advantage: float | None


@dataclass(frozen=True)
class Group:
    """The responses to a prompt. prompt: its text. gold: the right answer. Empty: not known."""

    id: str
    domain: str
    prompt: str
    gold: str
    responses: Sequence[Response]


def page(title: str, groups: Sequence[Group]) -> str:
    """Return the page of a step."""
    domains = sorted({group.domain for group in groups})
    outcomes = sorted({response.outcome for group in groups for response in group.responses})
    style = STYLE + _choices("outcome", len(outcomes), inner=True) + _choices("domain", len(domains), inner=False)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">',
        f"<title>{_shown(title)}</title><style>{style}</style></head><body>",
        f"<h1>{_shown(title)}</h1>",
        *_filter("outcome", outcomes),
        *_filter("domain", domains),
        *(line for group in groups for line in _group(group, outcomes, domains)),
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def _choices(name: str, count: int, inner: bool) -> str:
    """Return the rules that hide what is not chosen. Names are numbers here: a hostile one gets into no rule."""
    rules = []
    for number in range(count):
        chosen, mark = f"body:has(#{name}-{number}:checked)", f"{name}-{number}"
        rules += [f"{chosen} .group:not(.{mark}){{display:none}}"]
        rules += [f"{chosen} .response:not(.{mark}){{display:none}}"] if inner else []
    return "\n".join(rules) + "\n"


def _filter(name: str, values: Sequence[str]) -> Iterator[str]:
    yield f"<fieldset><legend>{name}</legend>"
    yield f'<label><input type="radio" name="{name}" checked> all</label>'
    for number, value in enumerate(values):
        yield f'<label><input type="radio" name="{name}" id="{name}-{number}"> {_shown(value)}</label>'
    yield "</fieldset>"


def _group(group: Group, outcomes: Sequence[str], domains: Sequence[str]) -> Iterator[str]:
    there = sorted({outcomes.index(response.outcome) for response in group.responses})
    marks = " ".join([f"domain-{domains.index(group.domain)}", *(f"outcome-{number}" for number in there)])
    num_right = sum(response.outcome == "right" for response in group.responses)
    rewards = [response.reward for response in group.responses if response.outcome != "fault"]
    yield f'<details class="group {marks}"><summary>'
    yield f"<b>{num_right}/{len(group.responses)} right</b> {_shown(group.domain)} <span class=soft>{_shown(group.id)}"
    yield f"mean reward {fmean(rewards):.3f}" if rewards else "no reward"
    yield "</span></summary>"
    yield _pre(group.prompt) if group.prompt else "<p class=soft>The prompt's text is not known.</p>"
    yield f"<p>gold <b>{_shown(group.gold)}</b></p>" if group.gold else ""
    for response in group.responses:
        yield from _response(response, outcomes)
    yield "</details>"


def _response(response: Response, outcomes: Sequence[str]) -> Iterator[str]:
    number = outcomes.index(response.outcome)
    kind = response.outcome if response.outcome in OUTCOMES else ""
    yield f'<section class="response outcome-{number} {kind}"><div class="facts"><b>{_shown(response.outcome)}</b>'
    yield f"<span>sample {response.sample}</span><span>reward {response.reward:.3f}</span>"
    yield (
        f"<span>advantage {response.advantage:+.3f}</span>" if response.advantage is not None else "<span class=soft>not trained on</span>"
    )
    yield f"<span>{response.num_tokens:,} tokens</span><span>ended by {_shown(response.ended)}</span></div>"
    yield f"<div class=soft>{_shown(response.why)}</div>" if response.why else ""
    thought, closing, answer = response.text.partition(CLOSE)
    if closing:
        thought = thought.removeprefix(OPEN)
        yield f"<details><summary class=soft>think, {len(thought):,} characters</summary>{_pre(thought)}</details>"
        yield _pre(answer)
    else:
        yield _pre(response.text)
    yield "</section>"


def _pre(text: str) -> str:
    """Return a text as it stands, its middle left out where it is long. HTML drops a newline at the start of a pre: it has one to drop."""
    cut = len(text) - HEAD_CHARS - TAIL_CHARS
    if cut <= 0:
        return f"<pre>\n{_shown(text)}</pre>"
    left_out = f"</pre><p class=soft>{cut:,} characters are left out</p><pre>\n"
    return f"<pre>\n{_shown(text[:HEAD_CHARS])}{left_out}{_shown(text[-TAIL_CHARS:])}</pre>"


def _shown(text: str) -> str:
    return escape(printable(text, keep="\n\t"))
