"""The `hf download` lines that fetch what a mixture needs of each source, from what the configs say of the sources' origin: facts nobody checked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from shlex import join

from megatron_prism.core.config import PartConfig, PrepareConfig, SourceConfig
from megatron_prism.prepare import sources

SPARE = 1.1  # times what is needed: tokens are counted with another tokenizer, files differ in size
TEXT_BYTES = 4  # of a token, about
NUMBER = "{number}"  # in hf_files: the number of a file among all


@dataclass(frozen=True)
class Download:
    """How a source's part is fetched. share: of its files, None where the tokens of the source are not known. command: None where none can be written."""

    source: str
    share: float | None
    text_bytes: int | None
    command: str | None
    note: str


def downloads(config: PrepareConfig, needed_tokens: Mapping[str, int | None]) -> list[Download]:
    """Return a line for each part that has a hf_id. needed_tokens: of each source, None for all it has."""
    return [line for source in config.sources for line in _of_source(source, needed_tokens[source.name])]


def _of_source(source: SourceConfig, need: int | None) -> Iterator[Download]:
    parts, available = sources.parts(source), source.available_tokens
    share = None if available is None or need is None else min(1.0, need * SPARE / available)
    for part in parts:
        hf_id = part.hf_id or source.hf_id
        if hf_id is None:
            continue
        pattern, taken, note = _pattern(part, 1.0 if share is None or part.sample else share)
        about = None if available is None or len(parts) > 1 else round(available * TEXT_BYTES * taken)
        if "*" in hf_id:
            yield Download(source.name, taken, about, None, f"{hf_id} are several: choose them, and fetch {pattern} of each")
            continue
        words = ["hf", "download", hf_id, "--repo-type", "dataset", "--include", pattern, "--local-dir", str(_folder(part))]
        yield Download(source.name, None if share is None else taken, about, join(words), note)


def _pattern(part: PartConfig, share: float) -> tuple[str, float, str]:
    """Return a glob of an origin's files that takes at least `share` of them, the share that it takes, and what to know of it.

    Files are taken by the last digits of their number, so they are spread over all: those in 0 and 1 are a fifth, in 00 to 60 seven of a hundred.
    """
    pattern = part.hf_files or "*"
    if NUMBER not in pattern:
        note = "" if share == 1 else f"{share:.1%} would do: how its files are numbered is not known"
        return pattern, 1.0, note
    if share > 0.9:
        return pattern.replace(NUMBER, "*"), 1.0, "all of it is read" if not part.sample else "its sample is drawn from all of it"
    places = next(places for places in (1, 2, 3) if share * 10**places >= 1 or places == 3)
    count = math.ceil(share * 10**places - 1e-9)
    ending = f"[0-{count - 1}]" if count > 1 else "0"
    return pattern.replace(NUMBER, f"*{ending}{'0' * (places - 1)}"), count / 10**places, ""


def _folder(part: PartConfig) -> Path:
    """Return the folder in which a part's first pattern begins."""
    names = list(takewhile(lambda name: not set("*?[") & set(name), Path(part.path[0]).parts))
    return Path(*(names if len(names) < len(Path(part.path[0]).parts) else names[:-1]))
