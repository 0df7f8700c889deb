"""Read folders for a report by what they hold: a study, a run, a mixture, an evaluation, a verdict, a merge, a scan, an analysis.

Everything is data that others wrote: a file that is no object, or lacks what its kind has, is told of and left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from megatron_prism.core.errors import InputError, Problem, printable, raise_problems
from megatron_prism.core.manifest import read_json
from megatron_prism.report.blend import BlendPart
from megatron_prism.report.material import Claim, Evaluation, Material, Mixture, Result, Run, Stage
from megatron_prism.report.names import free

STUDY = Path("study", "study.json")
NOT_ENTERED = {"checkpoints", "tensorboard", "samples", "origin", "rollouts", "records", "grades", "answers", "nel", "study"}
ANALYSES = ("cka", "landscape")  # folders of an analysis: a landscape's holds an evaluation for each of its points
DEPTH, MAX_JSON_BYTES = 4, 1 << 28
MAX_LINE_CHARS = 1 << 26  # of a file of lines, which may have any size: what is read of it at once
KINDS = (
    "a study, a run, a prepared mixture, prompts, an evaluation, a verdict, a merge, a scan for contamination, or a result of prism analyze"
)
DAMAGED = (
    OSError,
    ValueError,
    LookupError,
    ArithmeticError,  # a number that no float holds
    TypeError,
    AttributeError,
    RuntimeError,
    yaml.YAMLError,
)  # RuntimeError: JSON too deep, links in a loop


def read(places: Sequence[Path]) -> list[Material]:
    """Return what the places hold: each study by itself, all else together. Raises: InputError naming every place that holds nothing known."""
    problems: list[Problem] = []
    studies: list[Material] = []
    others, seen = Material("results"), set()
    for place in places:
        try:
            if place.resolve() in seen:
                problems.append(Problem(str(place), "the same place again", "each place once: studies are seeds, of which each counts"))
                continue
            seen.add(place.resolve())
            if (place / STUDY).is_file():
                studies.append(_study(place))
                continue
            one = _walk(place, place.resolve().name, place, DEPTH)
            if one.is_empty:
                problems.append(Problem(str(place), "nothing that a report knows", KINDS))
            others = _joined(others, one)
        except InputError as error:
            problems += error.problems
        except DAMAGED as error:
            is_study = (place / STUDY).exists() if not isinstance(error, OSError | RuntimeError) else False
            required = "a study's record as this version of prism writes it" if is_study else KINDS
            problems.append(Problem(str(place / STUDY if is_study else place), _why(error), required))
    raise_problems(problems)
    return [_with_own_runs(one) for one in (*_told_apart(studies, places), *([] if others.is_empty else [others]))]


def _told_apart(studies: Sequence[Material], places: Sequence[Path]) -> list[Material]:
    """Return studies with names of their own: seeds of one study are named by their folders, else numbered."""
    names = [one.name for one in studies]
    folders = [place.resolve().name for place in places if (place / STUDY).is_file()]
    told = folders if len(set(folders)) == len(studies) else [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return [one if names.count(one.name) == 1 else replace(one, name=name) for one, name in zip(studies, told, strict=True)]


def _with_own_runs(one: Material) -> Material:
    """Return a material whose runs have names of their own: two that made one model (an array's) are no seeds of it."""
    names: list[str] = []
    for run in one.runs:
        names.append(free(run.name, names, "" if run.stage == run.name else run.stage))
    return replace(one, runs=tuple(replace(run, name=name) for run, name in zip(one.runs, names, strict=True)))


def _study(root: Path) -> Material:
    values = read_json(root / STUDY)
    if values["kind"] != "study":
        raise InputError(Problem(str(root / STUDY), f"kind {values['kind']!r}", "study"))
    stages, one = [], Material(str(values["name"]))
    for name, of in values["stages"].items():
        optional = {key: of.get(key) for key in ("seconds", "cpu_s", "num_starts")}
        model, failure = (None if of.get(key) is None else str(of[key]) for key in ("model", "failure"))
        stages.append(
            Stage(
                name,
                str(of.get("title") or name),
                model,
                job=str(of["job"]),
                after=tuple(map(str, of["after"])),
                state=str(of["state"]),
                reason=str(of.get("reason") or ""),
                failure=failure,
                **optional,
            )
        )
        one = _joined(one, _of_stage(root, str(values["run_dir"]), name, of, model or name))
    claims = tuple(
        Claim(
            **{key: str(of.get(key) or "") for key in ("name", "says", "source", "judged_at", "note", "state")},
            checks=tuple(of["checks"]),
            figures=of["figures"],
        )
        for of in values["claims"]
    )
    return replace(one, stages=tuple(stages), claims=claims)


def _of_stage(root: Path, run_dir: str, name: str, of: Mapping[str, Any], label: str) -> Material:
    """Return what a stage left. A study may have been moved: what was below run_dir is looked for below the folder at hand.

    A job's result often stands in its output and in result.json: it is taken once.
    """
    output = Path(of["output"] or root / "none")
    place = root / output.relative_to(run_dir) if output.is_relative_to(run_dir) else output
    left = _walk(place, label, place, 1, name) if place.exists() else Material("")
    result = _result(root / STUDY.parent / name / "result.json", name, label, str(of["job"]))
    if result.analyses:
        return result
    is_there = left.verdicts or left.contaminations or left.merges
    return left if is_there else _joined(left, result)


def _walk(place: Path, label: str, top: Path, depth: int, stage: str = "") -> Material:
    """Return what a file or folder holds, and what the folders below it hold."""
    if place.is_file():
        return _result(place, place.stem, label, "")
    if not place.is_dir():
        raise InputError(Problem(str(place), "no such file or folder", KINDS))
    try:
        one = _folder(place, label, stage or label)
        folders = sorted((path for path in place.iterdir() if path.is_dir()), key=lambda path: (_created(path), path.name))
    except OSError as error:
        return Material("", told=(f"{label}: {place.name} cannot be read ({_why(error)})",))
    if depth == 0 or one.mixtures or _kind(place) in ANALYSES:
        return one
    for path in folders:
        if path.name not in NOT_ENTERED and not path.name.startswith(".") and not path.is_symlink():
            below = path.relative_to(top).as_posix() if not stage else label
            one = _joined(one, _walk(path, below, top, depth - 1, stage))
    return one


def _kind(folder: Path) -> str:
    """Return what a folder's manifest says it is, empty where it says nothing."""
    try:
        return str(read_json(folder / "manifest.json").get("kind"))
    except DAMAGED:
        return ""


def _created(folder: Path) -> str:
    """Return when a folder was begun, as its own manifest says: the order of the report."""
    try:
        values = read_json(folder / "manifest.json")
        return str((values["starts"][0] if "starts" in values else values)["created"])
    except DAMAGED:
        return "9"  # after those that say it


def _folder(folder: Path, label: str, stage: str) -> Material:
    """Return what a folder's own files hold."""
    one, told = Material(""), []
    manifest = folder / "manifest.json"
    try:
        values = read_json(manifest) if manifest.is_file() else {}
        kind = values.get("kind")
        if kind == "run":
            one = replace(one, runs=(_run(folder, label, stage, values),))
        elif kind in ("prepared", "prompts"):
            one = replace(one, mixtures=(_mixture(label, values),))
        if kind == "evaluation" or (folder / "summary.json").is_file():
            one = replace(one, evaluations=(_evaluation(folder, label, stage, values),))
    except DAMAGED as error:
        told.append(f"{label}: manifest.json, summary.json or what they name is damaged ({_why(error)})")
    try:
        one = replace(one, evaluations=tuple(replace(each, questions=_questions(folder / "results.jsonl")) for each in one.evaluations))
    except DAMAGED as error:
        told.append(f"{label}: results.jsonl is damaged ({_why(error)})")
    one = replace(one, told=tuple(told))
    is_model = (folder / "config.json").is_file()
    names = {"merge.json"} if is_model else {path.name for path in folder.glob("*.json")} - {"manifest.json", "summary.json"}
    for name in sorted(names):
        one = _joined(one, _result(folder / name, stage if name in ("verdict.json", "merge.json") else Path(name).stem, label, ""))
    return one


def _result(path: Path, name: str, label: str, job: str) -> Material:
    """Return what a JSON file holds, by its kind. job: the study's word for it, where its file has no kind. Nothing: it is no result of ours."""
    one = Material("")
    try:
        if not path.is_file():
            return one
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            return replace(
                one, told=(f"{label}: {path.name} has {size / 2**20:.0f} MiB, and is not read: a result of ours has at most 256",)
            )
        values = read_json(path)
        kind = values.get("kind") if isinstance(values, dict) else None
    except DAMAGED as error:
        return replace(one, told=(f"{label}: {path.name} is damaged ({_why(error)})",))
    result = Result(name, label, values)
    if kind == "verdict":
        return replace(one, verdicts=(result,))
    if kind == "merge":
        return replace(one, merges=(result,))
    if kind == "contamination":
        return replace(one, contaminations=(result,))
    if kind == "analysis" or job.startswith("analyze "):
        return replace(one, analyses={str(values.get("analysis") or job.removeprefix("analyze ")): (result,)})
    return one


def _run(folder: Path, label: str, stage: str, manifest: Mapping[str, Any]) -> Run:
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    metrics = folder / "metrics.jsonl"
    lines = [line for line in _json_lines(metrics) if line and isinstance(line.get("step"), int)] if metrics.is_file() else []
    plan = manifest["starts"][-1]["plan"]
    records = tuple(line for line in lines if "loss" in line)
    validations = tuple(line for line in lines if "loss" not in line)
    return Run(label, stage, "responses_per_step" in plan, int(config["steps"]), plan, records, validations)


def _json_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the objects of a file of lines, None for what is no whole one: a run's last line may still be being written."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        while line := stream.readline(MAX_LINE_CHARS):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            yield values if isinstance(values, dict) else None


def _mixture(label: str, manifest: Mapping[str, Any]) -> Mixture:
    if manifest["kind"] == "prompts":
        counts = {name: int(of["prompts"] if isinstance(of, dict) else of) for name, of in manifest["domains"].items()}
        total = sum(counts.values()) or 1
        return Mixture(label, "prompts", tuple(BlendPart(name, name, count / total, count, None) for name, count in counts.items()))
    domains = {source["name"]: source.get("domain") for source in manifest["config"]["sources"]}
    parts = manifest["blend"]["sources"]
    return Mixture(
        label, "tokens", tuple(BlendPart(of["name"], domains.get(of["name"]), of["share"], of["tokens"], of["epochs"]) for of in parts)
    )


def _evaluation(folder: Path, label: str, stage: str, manifest: Mapping[str, Any]) -> Evaluation:
    if not (folder / "summary.json").is_file():
        return Evaluation(label, stage, folder, str(manifest["model"]["sha256"]), has_ended=False)
    summary = read_json(folder / "summary.json")
    tasks = {str(name): of for name, of in summary["tasks"].items() if isinstance(of, dict)}
    if unfit := [name for name, of in tasks.items() if not isinstance(of.get("set", {}), dict)]:
        raise ValueError(f"tasks without a set: {', '.join(unfit)}")
    return Evaluation(label, stage, folder, str(summary["model"]["sha256"]), True, tasks)


def _questions(path: Path) -> dict[str, dict[str, float]]:
    """Return each question's mean score by task. A fault has no score. Raises: ValueError where a line is none, as means would be of the others."""
    scores: dict[str, dict[str, list[float]]] = {}
    for number, line in enumerate(_json_lines(path) if path.is_file() else (), 1):
        if line is None:
            raise ValueError(f"line {number} is no whole JSON object")
        if isinstance(line.get("score"), int | float) and "task" in line and "id" in line:
            scores.setdefault(str(line["task"]), {}).setdefault(str(line["id"]), []).append(float(line["score"]))
    return {task: {id: fmean(own) for id, own in by_id.items()} for task, by_id in scores.items()}


def _joined(one: Material, other: Material) -> Material:
    names = ("runs", "mixtures", "evaluations", "verdicts", "merges", "contaminations", "told")
    joined: Any = {name: (*getattr(one, name), *getattr(other, name)) for name in names}
    analyses = {name: (*one.analyses.get(name, ()), *other.analyses.get(name, ())) for name in {**one.analyses, **other.analyses}}
    return replace(one, **joined, analyses=analyses)


def _why(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}")[:300]
