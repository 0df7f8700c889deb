"""`prism rl export` and `prism rl serve`: what NeMo-Aligner or NeMo-RL is started with, and the reward server that NeMo-Aligner asks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint import folder, start
from megatron_prism.core import disk, log, paths
from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.check.cluster import check_cluster
from megatron_prism.core.config import ClusterConfig, ModelConfig, RLConfig
from megatron_prism.core.config.aligner import AlignerConfig
from megatron_prism.core.config.nemo_rl import NemoRlConfig
from megatron_prism.core.errors import BackendMissing, InputError, Problem, raise_problems
from megatron_prism.core.layers import merge, parse_override
from megatron_prism.core.load import build, load, placed
from megatron_prism.core.manifest import describe, read_json, sha256_file, write_json, write_text
from megatron_prism.data import prompts as prompt_set
from megatron_prism.data import special_tokens, tokenizer
from megatron_prism.grade.outcome import Graded, Item
from megatron_prism.rl.aligner import answers, forward, from_rl, nemo_rl, overrides, preflight, prompts, script
from megatron_prism.rl.aligner.reward import Grade, Rewarder
from megatron_prism.rl.aligner.server import RewardServer

OWN = "aligner."  # of an override of AlignerConfig's key, beside those of an RL config
ANSWERS, MANIFEST, TOKENIZER = "answers.jsonl", "manifest.json", "tokenizer"
TOKEN = "PRISM_REWARD_TOKEN"


def run_export(path: Path, given: Sequence[str], cluster_path: Path, out: Path, dry_run: bool = False) -> dict[str, Any]:
    """Export a run described by a YAML, its overrides and a cluster's YAML."""
    config, cluster = load(path, AlignerConfig, given), _cluster(cluster_path)
    with placed(path, AlignerConfig, given):
        return export(config, cluster, out, dry_run)


def run_rl(path: Path, given: Sequence[str], cluster_path: Path, out: Path, dry_run: bool = False) -> dict[str, Any]:
    """Export what `prism rl` would train. Overrides that begin with `aligner.` are of AlignerConfig's keys, which an RL config has not.

    Raises: InputError with every key that NeMo-Aligner has no equal of; what export raises.
    """
    of_rl, own = ([word for word in given if word.startswith(OWN) == is_own] for is_own in (False, True))
    config, cluster = load(path, RLConfig, of_rl), _cluster(cluster_path)
    with placed(path, RLConfig, of_rl):
        raise_problems([*check_bounds(config), *from_rl.problems(config, cluster.gpus_per_node)])
    mapped = (str(path), from_rl.values(config, cluster.gpus_per_node, out))
    changed = [parse_override(word.removeprefix(OWN), AlignerConfig) for word in own]

    def where(key: tuple[Any, ...]) -> str:
        return OWN + ".".join(map(str, key))

    values, problems = paths.expand(merge([mapped, *changed]), AlignerConfig, where)
    asked = build(values, AlignerConfig, where)
    sets = {"prompts": config.prompts, "validation.prompts": config.validation.prompts}
    for key, place in sets.items():
        if place is not None:
            problems += start.attempt(partial(prompt_set.read, place), key)[1]  # as `prism rl` reads it
    raise_problems(problems)
    return {**export(asked, cluster, out, dry_run), "not_carried": list(from_rl.NOT_CARRIED)}


def _cluster(path: Path) -> ClusterConfig:
    cluster = load(path, ClusterConfig)
    with placed(path, ClusterConfig):
        raise_problems(check_cluster(cluster))
    return cluster


def export(config: AlignerConfig, cluster: ClusterConfig, out: Path, dry_run: bool = False) -> dict[str, Any]:
    """Write the folder of a run: prompts, answers, overrides, scripts. A dry run checks everything and writes nothing.

    Raises: InputError with every problem of the config, the model and the sizes; else of the prompts.
    """
    folder.refuse_existing(out)
    problems = list(check_bounds(config))
    raise_problems(problems)
    checkpoint = folder.read(config.checkpoint)
    problems = [*preflight.model_problems(checkpoint.model, config), *preflight.size_problems(config, cluster.gpus_per_node)]
    raise_problems(problems)
    spec = tokenizer.load(checkpoint.assets, need_eos=True)
    training = _distinct(prompts.read(config.prompts), config.prompts, spec, config)
    held_out = training
    if config.validation_prompts is not None:
        held_out = _distinct(prompts.read(config.validation_prompts), config.validation_prompts, spec, config)
    table = answers.table([*training[0], *held_out[0]], [*training[2], *held_out[2]])
    if len(training[0]) < config.num_prompts:
        raise InputError(Problem(str(config.prompts), f"{len(training[0])} distinct prompts", f"at least num_prompts {config.num_prompts}"))
    ends = tuple(tokenizer.decode([token], spec) for token in spec.end_ids)
    raise_problems(
        [Problem("tokenizer", f"the end token {end!r}", "one without a comma, which TensorRT-LLM splits") for end in ends if "," in end]
    )
    place = out.resolve()
    settings = overrides.values(config, cluster.gpus_per_node, place, ends, len(training[0]))
    texts = script.render(config, cluster, checkpoint.model.family, place)
    if not dry_run:
        with folder.create(out) as temporary:
            for split, each in zip(prompts.SPLITS, (training, held_out, held_out), strict=True):
                prompts.write(temporary / f"{split}.jsonl", each[1])
            num_tokens = {answers.key(ids): len(ids) for ids in (*training[2], *held_out[2])}
            answers.write(temporary / ANSWERS, table, num_tokens)
            write_text(temporary / "overrides.txt", "\n".join(overrides.words(settings)) + "\n")
            for name, text in texts.items():
                write_text(temporary / name, text)
            shutil.copyfile(forward.__file__, temporary / "forward.py")
            _copy_tokenizer(checkpoint.assets, temporary / TOKENIZER)
            write_json(temporary / MANIFEST, _manifest(config, checkpoint.root, temporary, settings))
    return _outcome(config, cluster, checkpoint.model, out, len(training[0]), len(held_out[0]), settings)


Read = tuple[list[prompts.Prompt], list[str], list[list[int]]]  # prompts, their texts, their tokens


def _distinct(read: list[prompts.Prompt], path: Path, spec: tokenizer.TokenizerSpec, config: AlignerConfig) -> Read:
    """Return prompts with their texts and tokens; of prompts of the same tokens and answer, the first."""
    texts, ids = prompts.texts(read, spec, config.max_prompt_tokens, path)
    answers.table(read, ids)  # refuses one prompt with two answers
    first = {answers.key(one): index for index, one in reversed(list(enumerate(ids)))}
    kept = sorted(first.values())
    if len(kept) < len(read):
        log.get().info("%s: %d prompts are repeated, and left out", path, len(read) - len(kept))
    return [read[index] for index in kept], [texts[index] for index in kept], [ids[index] for index in kept]


def _copy_tokenizer(assets: Path, to: Path) -> None:
    to.mkdir()
    names = (tokenizer.FILE, *tokenizer.OTHER_FILES, *special_tokens.FILES, special_tokens.MAP)
    for name in names:
        if (assets / name).is_file():
            shutil.copyfile(assets / name, to / name)


def _manifest(config: AlignerConfig, root: Path, place: Path, settings: dict[str, Any]) -> dict[str, Any]:
    files = [config.prompts, *([config.validation_prompts] if config.validation_prompts else [])]
    written = {path.name: sha256_file(path) for path in sorted(place.iterdir()) if path.is_file()}
    written[f"{TOKENIZER}/{tokenizer.FILE}"] = sha256_file(place / TOKENIZER / tokenizer.FILE)
    return describe(
        "aligner",
        {str(path): sha256_file(path) for path in files},
        checkpoint=str(root),
        port=config.port,
        overrides=settings,
        files=written,
    )


def _outcome(
    config: AlignerConfig,
    cluster: ClusterConfig,
    model: ModelConfig,
    out: Path,
    num_training: int,
    num_held_out: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    return {
        "folder": str(out),
        "family": model.family,
        "prompts": num_training,
        "validation_prompts": num_held_out if config.validation_prompts else "the training prompts",
        "data_parallel": overrides.data_parallel(config, cluster.gpus_per_node),
        "rollouts_a_step": config.num_prompts * config.num_samples,
        "global_batch_size": settings["model.global_batch_size"],
        "epochs": settings["trainer.reinforce.max_epochs"],
        "defects": list(preflight.DEFECTS),
    }


def open_server(root: Path, grade: Grade, host: str, port: int | None) -> RewardServer:
    """Return the bound reward server of an exported folder. port: None for the folder's.

    Raises: InputError where the folder is none, a file of it has changed, or the address needs a token. EnvironmentFault: the port is in use.
    """
    try:
        with disk.reading(root):
            manifest = read_json(root / MANIFEST)
        files, own_port = dict(manifest["files"]), int(manifest["port"])
    except OSError as error:
        fix = "prism rl export nemo_aligner makes one"
        raise InputError(Problem(str(root), disk.unread(root, error), "a folder of prism rl export nemo_aligner", fix)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            Problem(str(root / MANIFEST), f"{type(error).__name__}: {error}", "a folder of prism rl export nemo_aligner")
        ) from None
    for name in (ANSWERS, f"{TOKENIZER}/{tokenizer.FILE}"):
        if not (root / name).is_file() or sha256_file(root / name) != files.get(name):
            raise InputError(Problem(str(root / name), "absent, or changed since the export", "the exported file", "export again"))
    spec = tokenizer.load(root / TOKENIZER, need_eos=True)
    rewarder = Rewarder(answers.read(root / ANSWERS), spec, grade)
    return RewardServer(host, own_port if port is None else port, rewarder, os.environ.get(TOKEN) or None)


def run_serve(root: Path, host: str, port: int | None) -> None:
    """Serve rewards until SIGTERM or SIGINT, with the grader that RL and evaluation use.

    Raises: BackendMissing where the grader, or that of a kind of prompt, is not installed; what open_server raises.
    """
    try:
        from megatron_prism.grade.grader import Grader
    except ImportError as error:
        raise BackendMissing("megatron_prism.grade.grader", "rewards", f"use a version of megatron_prism that has it ({error})") from None
    one_at_a_time = threading.Lock()  # a call already spreads its items over the grader's processes
    with Grader() as grader:

        def grade(items: Sequence[Item]) -> Mapping[str, Graded]:
            with one_at_a_time:
                graded: Mapping[str, Graded] = grader.grade(items)
                return graded

        server = open_server(root, grade, host, port)
        grader.prepare({prompt.kind for prompt in server.state.rewarder.answers.by_key.values()})
        serve(server)


def serve(server: RewardServer) -> None:
    """Serve until SIGTERM or SIGINT. Requests under way are not answered."""
    stopped = threading.Event()

    def stop(*_: object) -> None:
        stopped.set()
        threading.Thread(target=server.shutdown, daemon=True).start()  # it waits for serve_forever, which this handler interrupts

    before = {name: signal.signal(name, stop) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        log.get().info("serving rewards on %s port %d", *server.server_address[:2])
        server.serve_forever(poll_interval=0.2)
    finally:
        server.server_close()
        for name, handler in before.items():
            signal.signal(name, handler)
    if stopped.is_set():
        log.get().info("stopped by a signal")


def export_nemo_rl(config: NemoRlConfig, out: Path) -> dict[str, Any]:
    """Write the folder of a NeMo-RL GRPO run: grpo.yaml and its data.

    Raises: InputError with the problems of the config, else of the prompts, of which all must be of kind math.
    """
    import yaml

    folder.refuse_existing(out)
    raise_problems([*check_bounds(config), *nemo_rl.problems(config)])
    by_split = {"train": prompts.read(config.prompts), "validation": prompts.read(config.validation_prompts)}
    others = {prompt.kind for read in by_split.values() for prompt in read} - {"math"}
    raise_problems([Problem("prompts", f"the kind {kind}", "math, which NeMo-RL grades itself") for kind in sorted(others)])
    if not (Path(config.hf) / tokenizer.FILE).is_file():
        log.get().warning("%s is not on this machine: whether a prompt leaves room in seq_length was not looked at", config.hf)
    else:
        spec = tokenizer.load(Path(config.hf))
        raise_problems(nemo_rl.length_problems(config, [prompt for read in by_split.values() for prompt in read], spec))
    settings = nemo_rl.values(config, out.resolve())
    with folder.create(out) as temporary:
        for split, read in by_split.items():
            lines = [json.dumps({"input": prompt.prompt, "output": prompt.gold}, ensure_ascii=False) for prompt in read]
            write_text(temporary / f"{split}.jsonl", "\n".join(lines) + "\n")
        write_text(temporary / "grpo.yaml", yaml.safe_dump(settings, sort_keys=False))
        inputs = {str(path): sha256_file(path) for path in (config.prompts, config.validation_prompts)}
        write_json(temporary / MANIFEST, describe("nemo_rl", inputs))
    return {"folder": str(out), **{split: len(read) for split, read in by_split.items()}}
