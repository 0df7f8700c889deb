"""Write every key of every job's YAML, from the dataclasses that define them, into docs/CONFIG.md: `python tools/config_table.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from generated import ROOT, write

from megatron_prism.jobs import config

DOCUMENT = ROOT / "docs" / "CONFIG.md"
TITLES = {
    "train": "prism train",
    "rl": "prism rl",
    "prepare": "prism prepare",
    "prompts": "prism prompts",
    "rl filter": "prism rl filter",
    "rl mix": "prism rl mix",
    "evaluate": "prism evaluate",
    "merge": "prism merge",
    "analyze landscape": "prism analyze landscape",
    "analyze cka": "prism analyze cka",
    "cluster": "a cluster",
    "pipeline": "a pipeline",
    "study": "prism study",
    "policy": "a policy: the rules of a verdict",
    "aligner": "prism rl export nemo_aligner",
    "nemo_rl": "prism rl export nemo_rl",
}


def table() -> str:
    """Return the keys of all jobs, a table a section."""
    return "\n".join(line for job in config.JOBS for line in _job(job))


def _job(job: str) -> Iterator[str]:
    yield from (f"## {TITLES[job]}", "")
    for section in config.run(job)["sections"]:
        if places := [place for place in section["places"] if place]:
            yield from (f"### {', '.join(f'`{place}`' for place in places)}", "")
        yield from (line for text in section["words"] for line in (_plain(text), ""))
        resume = ["resume"] * any(key["may_change"] for key in section["keys"])
        heads = ["key", "type, bounds", "default", *resume, ""]
        yield from (_row(heads), _row(["---"] * len(heads)))
        for key in section["keys"]:
            default = f"`{json.dumps(key['default'])}`" if "default" in key else "required" * key["is_required"]
            marks = ["may change" * key["may_change"]] * len(resume)
            facts = "; ".join(filter(None, [key["type"], key["bounds"]]))
            yield _row([f"`{key['key'].rpartition('.')[2]}`", _plain(facts), default, *marks, _plain(key["words"])])
        yield ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Return a text in which Markdown finds no emphasis and no cell's end."""
    return text.replace("*", "\\*").replace("|", "\\|")


if __name__ == "__main__":
    write(DOCUMENT, Path(__file__).name, table())
