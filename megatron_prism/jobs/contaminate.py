"""`prism contaminate DATA...`: which questions of evaluation sets stand in a mixture, a prompt set or files; by source and set, with examples.

Every input is checked, and the evaluation sets are read whole, before the data is.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_prism.core import disk, log, manifest
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.eval import benchmarks, contamination
from megatron_prism.eval.benchmarks import Against
from megatron_prism.eval.contamination import Index, Search, Tally
from megatron_prism.prepare import pool, texts
from megatron_prism.prepare.texts import Data

EXAMPLES, SUMMARY, KIND = "contaminated.jsonl", "contamination.json", "contamination"
NUM_NAMED, PROGRESS_S = 20, 30.0  # bad records in the log; seconds between two lines of it


def run(
    named: Sequence[str],
    against: Sequence[str],
    *,
    ngram: int = 13,
    shortest: int = 8,
    text: str = "{text}",
    question_fields: Sequence[str] = (),
    tokenizer: Path | None = None,
    num_examples: int = 3,
    num_workers: int | None = None,
    out: Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Scan data for evaluation sets and return what was found. With `out`, write contaminated.jsonl and contamination.json there.

    Raises: InputError with every input that is wrong, before any data is read. EnvironmentFault.
    """
    search = Search(_against(against), ngram, shortest, tuple(question_fields))
    problems = [Problem("--shortest", str(shortest), f"1 to --ngram {ngram}")] if not 1 <= shortest <= ngram else []
    is_taken = out is not None and out.exists() and (not out.is_dir() or any(out.iterdir()))
    problems += [Problem("--out", str(out), "a new folder, or an empty one")] if is_taken else []
    problems += [problem] if out and (problem := disk.unfit_output(out)) else []
    data = []
    for name in named:
        try:
            data.append(texts.open_data(name, text, tokenizer, prefix=Path(name).name if len(named) > 1 else ""))
        except InputError as error:
            problems += error.problems
    problems += _twice([source for part in data for source in part.sources], "DATA")
    try:
        of_sets = contamination.index(search)
    except InputError as error:
        problems += error.problems
    raise_problems(problems)
    described = contamination.describe(of_sets, search)
    for line in described:
        if line["num_too_short"]:
            counts = (line["benchmark"], line["num_too_short"], line["num_texts"], line["side"], shortest)
            log.get().warning("%s: %d of %d %ss have fewer than %d words and are not looked for", *counts)
    result: dict[str, Any] = {"kind": KIND, "ngram": ngram, "shortest": shortest, "against": described}
    if dry_run:
        return result | {"sources": [{"source": source} for part in data for source in part.sources]}
    inputs = manifest.sha256_files(path for one in search.against for path in benchmarks.paths(one)) | {
        path: sha for part in data for path, sha in part.inputs().items()
    }
    if out is not None:
        with disk.writing(out):  # before a scan of hours
            out.mkdir(parents=True, exist_ok=True)
    tallies, num_bad = _scan(data, search, of_sets, num_examples, num_workers)
    of_sources = [
        {"source": source, "num_documents": tally.num_documents, "num_bytes": tally.num_bytes, "num_bad_records": num_bad[source]}
        for source, tally in tallies.items()
    ]
    result |= {"sources": of_sources, "table": contamination.table(tallies, of_sets)}
    if out is not None:
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in contamination.examples(tallies, of_sets, num_examples)]
        _write(out, lines, manifest.describe(KIND, inputs, **{key: value for key, value in result.items() if key != "kind"}))
        result |= {"out": str(out)}
    return result


def _against(named: Sequence[str]) -> tuple[Against, ...]:
    """Return the evaluation sets of NAME=PATH words. Raises: InputError with every other word."""
    problems = [] if named else [Problem("--against", "none", "at least one evaluation set, as NAME=FILE")]
    sets = [Against(*texts.named_path(word)) for word in named]
    problems += [Problem("--against", repr(one.path), "NAME=FILE") for one in sets if not one.name]
    raise_problems([*problems, *_twice([one.name for one in sets if one.name], "--against")])
    return tuple(sets)


def _twice(names: Sequence[str], where: str) -> list[Problem]:
    return [
        Problem(where, f"the name {name!r} twice", "a name used once", "give a name: NAME=PATH")
        for name, n in Counter(names).items()
        if n > 1
    ]


def _scan(
    data: Sequence[Data], search: Search, of_sets: Index, num_examples: int, num_workers: int | None
) -> tuple[dict[str, Tally], Counter[str]]:
    """Return what each source holds, and how many of its records gave no text. Raises: InputError for a source without a document."""
    tallies = {source: Tally() for part in data for source in part.sources}
    num_bad: Counter[str] = Counter()
    begin = said = time.monotonic()
    with pool.workers(num_workers) as each:
        for scanned in each(partial(contamination.scan, search=search), (batch for part in data for batch in part.batches())):
            tallies[scanned.source].add(scanned, of_sets, num_examples)
            for line in scanned.bad[: max(NUM_NAMED - num_bad.total(), 0)]:
                log.get().warning("not read: %s", line)
            num_bad[scanned.source] += len(scanned.bad)
            if (now := time.monotonic()) - said > PROGRESS_S:
                said, num_mb = now, sum(tally.num_bytes for tally in tallies.values()) / 1e6
                log.get().info("%s: %.0f MB of text read, %.1f MB/s, now %s", KIND, num_mb, num_mb / (now - begin), scanned.source)
    empty = [source for source, tally in tallies.items() if not tally.num_documents]
    fix = "the log names them; where a field is missing: --text '{field}'"
    raise_problems(
        [
            Problem(
                f"source {source}", f"no document; {num_bad[source]} records that are not read", "at least one", fix * bool(num_bad[source])
            )
            for source in empty
        ]
    )
    return tallies, num_bad


def _write(out: Path, lines: Sequence[str], described: dict[str, Any]) -> None:
    with disk.writing(out):
        manifest.write_text(out / EXAMPLES, "".join(lines))
        manifest.write_json(out / SUMMARY, described)
