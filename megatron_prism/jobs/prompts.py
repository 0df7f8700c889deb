"""`prism prompts CONFIG`: records become a prompt set for RL, prompts.jsonl and a manifest that counts what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from megatron_prism.core import log, manifest
from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.check.data import check_decontaminate
from megatron_prism.core.config import MixConfig, PromptsConfig, PromptSourceConfig
from megatron_prism.core.disk import writing
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.load import to_dict
from megatron_prism.data import prompts as prompt_set
from megatron_prism.data.prompts import Prompt
from megatron_prism.prepare import documents, prompts, records, sources, workspace
from megatron_prism.prepare.lines import TooLong
from megatron_prism.prepare.sample import lot
from megatron_prism.prepare.sources import Input

NOT_IN_RESULT = ("out",)
NUM_NAMED = 20  # bad records in a message


def run(config: PromptsConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Write a prompt set and return its manifest. A dry run reads all and writes nothing.

    Raises: InputError for a wrong config, or bad records where on_bad_record is `error`.
    """
    raise_problems(_check(config))
    files = _files(config)
    inputs = manifest.sha256_files(file.path for part in [*files, _evaluation(config)] for file in part)
    if not dry_run and config.out.is_dir() and any(config.out.iterdir()):
        return _shown(config, existing(config, inputs))
    if config.decontaminate:
        documents.warn_of_short(config.decontaminate)
    seen: dict[str, str] = {}  # the gold by id
    bad: list[Problem] = []
    lines: list[str] = []
    facts: list[dict[str, Any]] = []
    for source, of_source in zip(config.sources, files, strict=True):
        left_out: Counter[str] = Counter()
        made = _drawn(_prompts(config, source, of_source, seen, left_out, bad), source, config.seed, seen, left_out)
        lines += map(prompt_set.to_line, made)
        if num_apart := left_out["dedup_other_gold"]:
            log.get().warning("%s: %d problems again with another gold: the first was kept, right or wrong", source.name, num_apart)
        num_records = len(made) + sum(left_out.values())
        facts.append(
            {"name": source.name, "domain": source.domain, "records": num_records, "prompts": len(made), "left_out": dict(left_out)}
        )
    if config.on_bad_record == "error":
        raise_problems(bad)
    _tell(bad, sum(fact["left_out"].get("bad", 0) for fact in facts))
    if not lines:
        raise InputError(Problem("sources", "no prompt in any of them", "at least one", "see what keep and decontaminate leave out"))
    described = _describe(config, inputs, facts, lines)
    if not dry_run:
        write(config.out, lines, described)
    return _shown(config, described)


def write(out: Path, lines: Sequence[str], described: Mapping[str, Any]) -> None:
    """Write a prompt set, whole or not at all, with the sum of its lines in its manifest."""
    with workspace.folder(out) as folder, writing(folder):
        manifest.write_text(folder / prompt_set.FILE, "".join(lines))
        manifest.write_json(folder / prompt_set.MANIFEST, {**described, "sha256": manifest.sha256_file(folder / prompt_set.FILE)})


def _prompts(
    config: PromptsConfig,
    source: PromptSourceConfig,
    files: Sequence[Input],
    seen: dict[str, str],
    left_out: Counter[str],
    bad: list[Problem],
) -> Iterator[Prompt]:
    """Yield a source's prompts, each once. Count every other record in `left_out` by its reason; the first bad ones are named in `bad`.

    Raises: InputError at the NUM_NAMED-th bad record where on_bad_record is `error`.
    """
    overlap = documents.evaluation_overlap(config.decontaminate) if config.decontaminate else None
    for file in files:
        for number, record in sources.read_records(file, max_bytes=config.max_record_bytes):
            if isinstance(record, TooLong):
                left_out["too_long"] += 1
                continue
            try:
                made = prompts.prompt_of(record, source, config.seed)
            except prompts.Unsupported:
                left_out["unsupported_tests"] += 1
                continue
            except records.BadRecord as error:
                left_out["bad"] += 1
                fix = "correct it, or set on_bad_record: skip"
                if len(bad) < NUM_NAMED:
                    bad.append(Problem(file.place(number + error.line), error.found, error.required, fix))
                if len(bad) == NUM_NAMED and config.on_bad_record == "error":
                    raise InputError(
                        [*bad, Problem("sources", f"{NUM_NAMED} bad records", "none", "those behind them were not read")]
                    ) from None
                continue
            if made is None:
                left_out["keep"] += 1
            elif overlap is not None and overlap.first(made[1]) is not None:
                left_out["decontaminate"] += 1
            elif made[0].id in seen:
                left_out["dedup" if made[0].gold == seen[made[0].id] else "dedup_other_gold"] += 1
            else:
                seen[made[0].id] = made[0].gold
                yield made[0]


def _drawn(made: Iterator[Prompt], source: PromptSourceConfig, seed: int, seen: dict[str, str], left_out: Counter[str]) -> list[Prompt]:
    """Return the source's prompts, of more than its limit those with the smallest lots. Only so many are held in memory.

    What is not drawn may still come from another source.
    """
    if source.limit is None:
        return list(made)
    heap: list[tuple[int, int, Prompt]] = []  # the largest lot first
    for number, prompt in enumerate(made):
        heappush(heap, (-lot(prompt.id, seed, source.name), number, prompt))
        if len(heap) > source.limit:
            del seen[heappop(heap)[2].id]
            left_out["limit"] += 1
    return [prompt for _, _, prompt in sorted(heap, key=lambda entry: entry[1])]


def _tell(bad: Sequence[Problem], num_bad: int) -> None:
    """Name the first bad records, which are skipped."""
    more = [Problem("sources", f"{num_bad - len(bad)} bad records more", "none")] if num_bad > len(bad) else []
    for problem in [*bad, *more]:
        log.get().warning("left out: %s", problem)


def _check(config: PromptsConfig) -> list[Problem]:
    if not config.sources:
        return [Problem("sources", "an empty list", "at least one source")]
    names = [source.name for source in config.sources]
    twice = [index for index, name in enumerate(names) if name in names[:index]]
    problems = [*check_bounds(config), *check_decontaminate(config.decontaminate)]
    problems += [Problem(f"sources.{index}.name", repr(names[index]), "a name used once") for index in twice]
    for index, source in enumerate(config.sources):
        problems += [*prompts.check_source(source, f"sources.{index}"), *records.check_part(prompts.part_of(source), f"sources.{index}")]
    against = config.decontaminate.against if config.decontaminate else ()
    return problems + [
        problem for index, part in enumerate(against) for problem in records.check_part(part, f"decontaminate.against.{index}")
    ]


def _files(config: PromptsConfig) -> list[tuple[Input, ...]]:
    problems: list[Problem] = []
    files = [sources.files(prompts.part_of(source), f"sources.{index}.path", problems) for index, source in enumerate(config.sources)]
    plain = [(index, file) for index, of_source in enumerate(files) for file in of_source if file.is_plain]
    problems += [Problem(f"sources.{index}.path", str(file.path), "files of records: a .txt file has no fields") for index, file in plain]
    raise_problems(problems)
    return files


def _evaluation(config: PromptsConfig) -> tuple[Input, ...]:
    return documents.evaluation_files(config.decontaminate) if config.decontaminate else ()


def config_sha256(config: PromptsConfig | MixConfig) -> str:
    """Return the sum of what a config says of the prompts that it makes."""
    return manifest.sha256_json({key: value for key, value in to_dict(config).items() if key not in NOT_IN_RESULT})


def existing(config: PromptsConfig | MixConfig, inputs: Mapping[str, str]) -> Mapping[str, Any]:
    """Return the manifest of an `out` that was made from the same config and files.

    Raises: InputError where it holds anything else.
    """
    where, fix = f"out ({config.out})", "choose another out, or remove this one"
    if not (config.out / prompt_set.MANIFEST).is_file():
        raise InputError(Problem(where, "files that prompts did not write", "no folder, or an empty one", fix))
    described = prompt_set.manifest_of(config.out)
    if described["config_sha256"] != config_sha256(config):
        raise InputError(Problem(where, "a prompt set made from another config", "the same config", fix))
    if described["inputs"] != inputs:
        raise InputError(Problem(where, "a prompt set made before its input files changed", "the same input files", fix))
    if not documents.has_these_words(described):
        raise InputError(Problem(where, "a prompt set decontaminated by an earlier rule of words", "today's words", fix))
    log.get().info("%s: already made from the same config and files", config.out)
    return described


def _describe(config: PromptsConfig, inputs: Mapping[str, str], facts: Sequence[dict[str, Any]], lines: Sequence[str]) -> dict[str, Any]:
    domains: Counter[str] = Counter()
    for fact in facts:
        domains[fact["domain"]] += fact["prompts"]
    return manifest.describe(
        prompt_set.KIND,
        inputs,
        prompts=len(lines),
        domains=dict(domains),
        sources=list(facts),
        decontaminate=documents.searched(config.decontaminate) if config.decontaminate else None,
        config=to_dict(config),
        config_sha256=config_sha256(config),
    )


def _shown(config: PromptsConfig, described: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the command line shows of a manifest."""
    return {"out": str(config.out), **{key: described[key] for key in ("kind", "prompts", "domains", "sources", "decontaminate")}}
