"""Which of lm-eval's tasks a name stands for, and where their documents come from: all that can be refused, before a model is asked."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_prism.core.errors import BackendMissing, Problem, raise_problems
from megatron_prism.eval.retention import lm_files
from megatron_prism.eval.retention.leaderboards import LEADERBOARDS, Benchmark

NUM_NAMED = 3  # of the configurations that lack a file, a message names so many
SHARES = {"mean", "nanmean"}  # how lm-eval joins values that each document has
OF_TEXTS = {"perplexity", "weighted_perplexity", "bits_per_byte"}  # the same of log-likelihoods
TAKES_MANY = {"majority_vote", "take_first_k", "custom"}  # filters that score more than the first of a document's repeats


@dataclass(frozen=True)
class Planned:
    """A task of lm-eval that will be run.

    task: lm-eval's name. benchmark: of the leaderboard that asked for it, if one did; its group stands in benchmark.task. metric: whose value is a
    document's score. changes: what is set over lm-eval's own config. evaluated and examples: the splits of the documents and of the few-shot
    examples (None: none, or in the config itself). files: by split; empty where lm-eval loads the data itself.
    """

    task: str
    benchmark: Benchmark | None
    metric: str
    num_fewshot: int
    changes: Mapping[str, Any]
    evaluated: str
    examples: str | None
    files: Mapping[str, tuple[Path, ...]]

    @property
    def group(self) -> str:
        """Return the benchmark of a leaderboard that it is a part of, else its own name."""
        return self.benchmark.task if self.benchmark else self.task


@dataclass(frozen=True)
class Missing:
    """Splits of a dataset that a task lacks. root: where they were looked for; None: no path was given. has: the split that root itself is."""

    dataset: str
    config: str | None
    root: Path | None
    splits: tuple[str, ...]
    has: str | None


def plan(
    names: Sequence[str],
    paths: Mapping[str, Path],
    index: Mapping[str, Any],
    num_fewshot: int | None = None,
    hub: bool = False,
    where: str = "lm_eval",
) -> tuple[Planned, ...]:
    """Return the tasks that names stand for: `leaderboard_v1`, `leaderboard_v2`, or any task, group or tag of lm-eval, each task once.

    paths: by task, by group, or "" for all others: a folder (lm_files.splits), or the file of a task's evaluated split. index: lm-eval's
    TaskManager.task_index. num_fewshot: in place of a task's own, but not of a leaderboard's. hub: let lm-eval load what no path holds, from its
    cache or the network. where: the key of the section that says all this.
    Raises: InputError with every unknown name, missing file (once a dataset, with what to download), and task that would be scored wrongly.
    """
    problems = [
        Problem(
            f"{where}.files{key and f'.{key}'}", f"{path}, which is not there", "a folder of datasets, or the file of a task's documents"
        )
        for key, path in paths.items()
        if not path.exists()
    ]
    lacking: list[Missing] = []
    planned: dict[str, Planned] = {}
    for name in names:
        for benchmark in LEADERBOARDS.get(name, (None,)):
            group = benchmark.task if benchmark else name
            if group not in index:
                problems.append(Problem("lm_eval task", group, "leaderboard_v1, leaderboard_v2, or a task, group or tag of lm-eval"))
                continue
            for task, overrides in leaves(group, index):
                root = next((paths[key] for key in (task, group, name, "") if key in paths), None)
                config = {**index[task].cfg, **overrides}
                shots = benchmark.num_fewshot if benchmark else _num_fewshot(config, num_fewshot)
                problems += refusals(task, config)
                one, missing = _with_files(task, benchmark, config, overrides, shots, root, hub)
                lacking += [missing] if missing is not None and (root is None or root.exists()) else []
                planned.setdefault(task, one)
    raise_problems([*problems, *_downloads(lacking, f"{where}.files")])
    return tuple(planned.values())


def leaves(name: str, index: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (task, what its groups set over its config) of a task, group or tag of lm-eval."""
    entry = index[name]
    if entry.cfg is None:  # a tag
        yield from ((task, {}) for task in sorted(entry.tags))
    elif "group" not in entry.cfg:
        yield name, {}
    else:
        yield from _members(entry.cfg, index)


def _members(group: Mapping[str, Any], index: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    from lm_eval.config.group import GroupConfig

    structural = {field.name for field in fields(GroupConfig)}
    own = {key: value for key, value in group.items() if key not in structural}
    for member in group.get("task") or ():
        if isinstance(member, str):
            member = {"task": member}
        if "group" in member and member["group"] not in index:  # a group within a group
            below, more = list(_members(member, index)), {}
        else:
            more = {key: value for key, value in member.items() if key not in ("task", "group")}
            below = list(leaves(member.get("group", member.get("task")), index))
        yield from ((task, {**overrides, **own, **more}) for task, overrides in below)


def refusals(task: str, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield why a task's scores would be wrong, or unsafe to compute."""
    where = f"lm_eval task {task}"
    if "class" in config:
        yield Problem(where, "a task in Python, which loads its own data", "a task that a config describes")
    elif metric_of(config) is None:
        found = f"{', '.join(_metrics(config))}, which judge all documents together"
        yield Problem(where, found, "a metric that each document has, such as acc or exact_match", "choose another task")
    if config.get("unsafe_code"):
        yield Problem(where, "a task that runs a model's code here", "code in the sandbox", "use prism's own sets, such as humaneval")
    filters = [part.get("function") for pipeline in config.get("filter_list") or () for part in pipeline["filter"]]
    if int(config.get("repeats") or 1) > 1 and not TAKES_MANY & set(filters):
        found = f"repeats {config['repeats']}, of which lm-eval scores the first alone"
        yield Problem(where, found, "1, or a filter that takes them all", "sample a set of prism's own several times")
    if "ifeval" in task:
        yield from _instruction_needs(where)


def metric_of(config: Mapping[str, Any]) -> str | None:
    """Return the first of a task's metrics that each document has; None where all are of the documents together (mcc, f1 of labels, bleu).

    A perplexity comes last, since it is no share; bits_per_byte is read as the probability of a byte.
    """
    metrics = _metrics(config)
    plain = [name for name, joined in metrics.items() if joined in SHARES or (joined in OF_TEXTS and "perplexity" not in name)]
    return next(iter([*plain, *(name for name, joined in metrics.items() if joined in OF_TEXTS)]), None)


def _metrics(config: Mapping[str, Any]) -> dict[str, str]:
    """Return how lm-eval joins the documents' values of each of a task's metrics: the name of its aggregation, or a function's path."""
    from lm_eval.api import registry

    joined = {function: name for name, function in registry.AGGREGATION_REGISTRY.items()}
    own = {name: joined.get(function, "") for name, function in registry.METRIC_AGGREGATION_REGISTRY.items()}
    found = {}
    default = registry.DEFAULT_METRIC_REGISTRY.get(config.get("output_type", "generate_until"), ())
    for one in config.get("metric_list") or [{"metric": name} for name in default]:
        name = str(one["metric"])
        name = name.rpartition(".")[2] if "/" in name else name  # of a function its path stands here
        found[name] = str(one.get("aggregation") or own.get(name, ""))
    return found


def _instruction_needs(where: str) -> Iterator[Problem]:
    """Yield what lm-eval's IFEval needs and would download by itself when it is imported."""
    for package in ("langdetect", "immutabledict"):
        if importlib.util.find_spec(package) is None:
            yield Problem(where, f"no package {package}", "lm-eval's extra ifeval", "pip install 'megatron_prism[eval]'")
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab")
    except (ImportError, LookupError):
        fix = "python -m nltk.downloader punkt_tab, and NLTK_DATA on a machine without a network"
        yield Problem(where, "no nltk data punkt_tab, which IFEval's checkers split sentences with", "it beside nltk", fix)


def _num_fewshot(config: Mapping[str, Any], wanted: int | None) -> int:
    """Return a task's number of examples. One whose config says 0 keeps it, as in lm-eval."""
    own = config.get("num_fewshot")
    return int(own or 0) if wanted is None or own == 0 else wanted


def _with_files(
    task: str, benchmark: Benchmark | None, config: Mapping[str, Any], overrides: dict[str, Any], shots: int, root: Path | None, hub: bool
) -> tuple[Planned, Missing | None]:
    """Return a task with the files of its splits, and those that are missing."""
    evaluated = config.get("test_split") or config.get("validation_split") or ""
    own = config.get("fewshot_config") or {}
    examples = None
    if shots and "samples" not in own:
        named = (config.get("fewshot_split"), own.get("split"), config.get("training_split"), config.get("validation_split"), evaluated)
        examples = next(split for split in named if split)
    dataset, name = str(config.get("dataset_path")), config.get("dataset_name")
    wanted = list(dict.fromkeys(split for split in (evaluated, examples) if split))
    files: dict[str, tuple[Path, ...]] = {}
    if root is not None:
        files = {evaluated: (root,)} if root.is_file() else lm_files.splits(root, dataset, name, wanted)
    changes = {**overrides, "num_fewshot": shots}
    if files:  # splits that nobody needs are not looked for
        keys = ("training_split", "validation_split", "fewshot_split")
        changes |= {key: None for key in keys if config.get(key) and config[key] not in files}
    metric = benchmark.metric if benchmark else metric_of(config) or ""  # none is refused
    planned = Planned(task, benchmark, metric, shots, changes, evaluated, examples, files)
    absent = tuple(split for split in wanted if split not in files)
    if not absent or (hub and not files):
        return planned, None
    return planned, Missing(dataset, name, root, absent, evaluated if root is not None and root.is_file() else None)


def _downloads(lacking: Sequence[Missing], where: str) -> Iterator[Problem]:
    """Yield a problem for each dataset, whose tasks (57 of MMLU) need the same download."""
    by_dataset: dict[tuple[str, Path | None, str | None], list[Missing]] = {}
    for one in lacking:
        by_dataset.setdefault((one.dataset, one.root, one.has), []).append(one)
    for (dataset, root, has), parts in by_dataset.items():
        splits = list(dict.fromkeys(split for part in parts for split in part.splits))
        configs = list(dict.fromkeys(part.config for part in parts if part.config))
        more = f", and {len(configs) - NUM_NAMED} more" if len(configs) > NUM_NAMED else ""
        of = f"{dataset} ({', '.join(configs[:NUM_NAMED])}{more})" if configs else dataset
        found = f"no file of the split {' and '.join(splits)} of {of} in {root or 'any path'}"
        folder = root if has is None and root is not None else "DIR"
        fix = f"hf download {dataset} --repo-type dataset --local-dir {folder}/{dataset}" + (
            f", and name DIR in {where}" if folder == "DIR" else ""
        )
        required = " and ".join(f"{split}.jsonl (or .parquet)" for split in splits)
        yield Problem(where, f"{root}, the file of {has} of {of} alone" if has else found, required, fix)


def require() -> None:
    """Raises: BackendMissing without lm-eval."""
    if importlib.util.find_spec("lm_eval") is None:
        raise BackendMissing("lm-eval", "the tasks of lm_eval", "pip install 'megatron_prism[eval]'")


def manager() -> Any:
    """Return lm-eval's TaskManager, which knows its tasks. It reads 14,683 configs. Raises: BackendMissing without lm-eval."""
    require()
    from lm_eval.tasks import TaskManager

    return TaskManager()
