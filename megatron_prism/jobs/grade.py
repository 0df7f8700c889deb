"""`prism grade`: grade a file of responses, one JSON object a line. The file is read twice, so that it never sits in memory: to check, to grade."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from megatron_prism.core import disk, log
from megatron_prism.core.config.grade import GradeConfig
from megatron_prism.core.errors import EnvironmentFault, InputError, Problem, raise_problems
from megatron_prism.grade import choice, code, strings
from megatron_prism.grade.grader import VERSION, Grader, require
from megatron_prism.grade.number import without_exponent
from megatron_prism.grade.outcome import KINDS, OUTCOMES, Item

BATCH_ITEMS, BATCH_BYTES = 1024, 64 << 20
MAX_PROBLEMS = 24  # printed; the rest are counted


def run(file: Path, out: Path, config: GradeConfig) -> dict[str, Any]:
    """Grade the lines of a file into a new file, with `outcome` and `why` added, in their order; return the counts.

    A run that is cut short leaves a hidden file beside `out`; the same command goes on behind its last whole line.
    Raises: InputError with the bad lines, before anything is graded or written. EnvironmentFault where `out` cannot be written, or another
    run writes it.
    """
    kinds = check(file, out)
    require(kinds)
    start = time.monotonic()
    partial = partial_of(out, config)
    with disk.writing(out), partial.open("ab+") as stream:
        _hold(stream, out)
        try:
            counts = _go_on(file, stream, config, kinds)
            os.fsync(stream.fileno())
            partial.replace(out)
        except BaseException:
            with suppress(OSError):
                if partial.stat().st_size:
                    log.get().warning("%s is not whole: the same command goes on where this one ended", out)
                else:
                    partial.unlink()
            raise
    if counts["fault"]:
        log.get().warning("%d faults: these responses have no outcome; `why` names the cause", counts["fault"])
    outcomes: dict[str, int] = {name: counts[name] for name in OUTCOMES}
    return {"out": str(out), "graded": counts.total(), **outcomes, "seconds": round(time.monotonic() - start, 3)}


def partial_of(out: Path, config: GradeConfig) -> Path:
    """Return where a run writes until it is whole: another name for each version and setting of the graders that gives other outcomes."""
    decides = [VERSION, config.think, config.answer, config.cpu_limit_s]
    digest = hashlib.blake2b(repr(decides).encode(), digest_size=4).hexdigest()
    return out.with_name(f".{out.name}.{digest}.partial")


def _hold(stream: IO[bytes], out: Path) -> None:
    """Lock the file until this process closes it or ends."""
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise EnvironmentFault(f"{out}: another process grades into it; wait for it, or choose another --out") from None
    except OSError as error:  # a file system without locks
        log.get().warning("%s: no locks here (%s): make sure that no other run writes it", out, error.strerror)


def _go_on(file: Path, stream: IO[bytes], config: GradeConfig, kinds: Counter[str]) -> Counter[str]:
    """Grade the lines that the stream does not hold yet, and return the counts of all."""
    counts = _graded_before(file, stream)
    before, total = counts.total(), kinds.total()
    if before:
        log.get().info("%d of %d lines were graded before", before, total)
    with Grader(config, kinds) as grader, _ticking(total, before) as tick:
        for batch in _batches(file, before):
            items = [item_of(record) for record in batch]
            graded = grader.grade(items)
            for record, item in zip(batch, items, strict=True):
                result = graded[item.id]
                stream.write(_line(record, result.outcome, result.why, result.score))
                counts[result.outcome] += 1
            stream.flush()
            tick(len(batch))
    return counts


def _line(record: dict[str, Any], outcome: str, why: str, score: float | None) -> bytes:
    scored = {"score": score} if record["kind"] == "strings" else {}
    return json.dumps({**record, "outcome": outcome, "why": why, **scored}).encode() + b"\n"


def _graded_before(file: Path, stream: IO[bytes]) -> Counter[str]:
    """Count the outcomes of the lines that an earlier run wrote, and cut off what is not whole, or not of this file."""
    counts: Counter[str] = Counter()
    stream.seek(0)
    num_bytes = 0
    for (_, record), line in zip(_records(file), stream, strict=False):
        try:
            written = json.loads(line)
            outcome, why = written["outcome"], written["why"]
        except (ValueError, TypeError, KeyError, RecursionError):  # cut by the end of a process, or of the disk
            break
        if isinstance(record, str) or outcome not in OUTCOMES or line != _line(record, outcome, why, written.get("score")):
            break
        counts[outcome] += 1
        num_bytes += len(line)
    stream.truncate(num_bytes)
    return counts


def check(file: Path, out: Path) -> Counter[str]:
    """Check every line, and return how many there are of each kind.

    Raises: InputError with the problems of the first bad lines, by their numbers, and how many there are in all.
    """
    problems = [Problem("--out", f"{out}, which is there", "a new file")] if out.exists() else []
    if not out.parent.is_dir():
        problems.append(Problem("--out", str(out), f"a file in a folder that is there: {out.parent} is not"))
    kinds: Counter[str] = Counter()
    num_bad = num_named = 0
    lines_by_id: dict[bytes, int] = {}
    for number, record in _records(file):
        said = [record] if isinstance(record, str) else list(_wrong(record))
        if not isinstance(record, str) and not said:
            kinds[record["kind"]] += 1
            key = hashlib.blake2b(str(record["id"]).encode("utf-8", "surrogatepass"), digest_size=12).digest()
            if (first := lines_by_id.setdefault(key, number)) != number:
                said = [f"the id {record['id']!r} of line {first}: ids are compared as texts"]
        num_bad += bool(said)
        if said and len(problems) < MAX_PROBLEMS:
            num_named += 1
            problems += [Problem(f"{file}, line {number}", text, "a line as docs/GRADE.md says") for text in said]
    if num_bad > num_named:
        problems.append(Problem(str(file), f"{num_bad} bad lines in all", "none"))
    if not problems and not kinds:
        problems.append(Problem(str(file), "no lines", "a JSON object a line"))
    raise_problems(problems)
    return kinds


def item_of(record: dict[str, Any]) -> Item:
    """Return a checked line as an item to grade."""
    return Item(
        id=str(record["id"]),
        kind=record["kind"],
        response=record["response"],
        gold=without_exponent(record["gold"]) if record["kind"] == "math" else str(record.get("gold", "")),
        choices=tuple(record.get("choices", ())),
        tests=record.get("tests"),
        is_truncated=record.get("is_truncated", False),
    )


def _records(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield each line that is not blank: its number, and its object or what is wrong with it."""
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, f"no JSON ({error})"
                    continue
                yield number, record if isinstance(record, dict) else f"{type(record).__name__}, no JSON object"
    except OSError as error:
        raise InputError(Problem(str(file), error.strerror or str(error), "a file of JSON lines")) from None


def _wrong(record: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a line."""
    if type(record.get("id")) not in (str, int):
        yield "no id that is a text or an integer"
    if not isinstance(record.get("response"), str):
        yield "no response that is a text"
    if not isinstance(record.get("is_truncated", False), bool):
        yield "is_truncated that is neither true nor false"
    kind = record.get("kind")
    if graded := [key for key in ("outcome", "why", *(["score"] if kind == "strings" else [])) if key in record]:
        yield f"{' and '.join(graded)} of before, which grading writes"
    if kind == "math":
        if type(record.get("gold")) not in (str, int, float) or not str(record["gold"]).strip():
            yield "no gold that is a text or a number"
            return
        try:
            without_exponent(record["gold"])
        except ValueError as error:
            yield f"gold: {error}"
    elif kind == "choice":
        yield from _wrong_choice(record.get("gold"), record.get("choices"))
    elif kind == "code":
        if wrong := code.tests_problem(record.get("tests")):
            yield wrong
    elif kind == "strings":
        if record.get("gold") not in strings.WANTED:
            yield f"gold {ascii(record.get('gold'))[:80]}, neither all nor any: which of the choices are expected"
        expected = record.get("choices")
        if not isinstance(expected, list) or not expected or not all(isinstance(text, str) and text for text in expected):
            yield "no choices that are a list of expected texts"
    else:
        yield f"kind {ascii(kind)[:80]}, not one of {', '.join(KINDS)}"


def _wrong_choice(gold: Any, choices: Any) -> Iterator[str]:
    if not isinstance(choices, list) or not all(isinstance(option, str) for option in choices) or not 2 <= len(choices) <= 26:
        yield "no choices that are a list of 2 to 26 texts"
    elif not isinstance(gold, str) or len(gold) != 1 or gold not in choice.letters(choices):
        yield f"gold {ascii(gold)[:80]}, not one of {choice.letters(choices)}"
    elif same := [option for option in choices if choices.count(option) > 1]:
        yield f"choices with {ascii(same[0])[:80]} more than once"


def _batches(file: Path, before: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the records behind the first ones, several at once."""
    batch: list[dict[str, Any]] = []
    num_bytes = 0
    for number, record in islice(_records(file), before, None):
        if isinstance(record, str) or any(_wrong(record)):
            raise InputError(Problem(f"{file}, line {number}", "another line than when the file was checked", "a file that nobody writes"))
        batch.append(record)
        num_bytes += len(record["response"])
        if len(batch) == BATCH_ITEMS or num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


@contextmanager
def _ticking(total: int, before: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with log.told(Progress(console=console, disable=not console.is_terminal)) as bar:
        task = bar.add_task("responses", total=total, completed=before)
        yield lambda count: bar.advance(task, count)
