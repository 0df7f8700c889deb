"""The command line as a shell sees it: exit codes, one line a problem, no traceback, nothing written where nothing should be."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from megatron_prism import __version__
from megatron_prism.cli import entry
from megatron_prism.cli.options import GroupWithDefault
from megatron_prism.cli.submit import read_command

MODEL = {
    "family": "llama",
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 4,
    "vocab_size": 390,
    "max_position_embeddings": 64,
}


def prism(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_prism.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def commands(group: Any = None, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of every command that does something."""
    for name, command in (group or typer.main.get_command(entry.app)).commands.items():
        words = (*above, name)
        yield from commands(command, words) if hasattr(command, "commands") else [words]


def tree(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Return a prepared mixture of one source."""
    from megatron_prism.core.config import PrepareConfig, SourceConfig
    from megatron_prism.jobs import prepare

    root = tmp_path_factory.mktemp("cli")
    (root / "a.txt").write_text("\n\n".join(f"The sum of {n} and {n} is {n + n}." for n in range(50)))
    source = SourceConfig(name="a", path=(str(root / "a.txt"),), weight=100.0, split="paragraph")
    prepare.run(PrepareConfig(out=root / "data", tokenizer=tiny_tokenizer, sources=(source,), num_workers=1))
    return root / "data"


@pytest.fixture
def config(tmp_path: Path, prepared: Path, tiny_tokenizer: Path) -> Path:
    """Return the YAML of a small training run from scratch, whose run folder is tmp_path/run."""
    values = {
        "run_dir": str(tmp_path / "run"),
        "steps": 5,
        "precision": "fp32",
        "model": MODEL,
        "init": {"tokenizer": str(tiny_tokenizer)},
        "data": {"prepared": str(prepared), "seq_length": 32},
        "batch": {"global_size": 4},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "train.yaml"


def refused(done: subprocess.CompletedProcess[str], *named: str, code: int = 2) -> None:
    """Assert a refusal that a user can read: its exit code, what it names, no traceback, no result."""
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, done.stderr
    assert not [name for name in named if name not in done.stderr], done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("command", [(), *commands()], ids=" ".join)
def test_help_shows_an_example_of_every_command(command: tuple[str, ...]) -> None:
    done = prism(*command, "--help")
    assert done.returncode == 0 and done.stderr == ""
    spelled = " ".join(command).removesuffix(f" {GroupWithDefault.default}")
    assert not command or re.search(rf"Example[a-z_/., ]*: prism {spelled}", " ".join(done.stdout.split()))


def test_a_part_of_rl_is_named_by_options(tmp_path: Path) -> None:
    (tmp_path / "rl.yaml").write_text(yaml.safe_dump({"run_dir": "r", "steps": 2, "prompts": "p", "init": {"checkpoint": "c"}}))
    both = ("rl", tmp_path / "rl.yaml", "rollout.max_tokens=8", "batch.seq_length=32", "rollout.lag=1", "--dry-run")
    refused(prism(*both, "--only", "rollout"), "rollout.lag: found 1 under mode rollout")
    refused(prism(*both, "--only", "train", "--from", "r"), "train_from: found r; required another run's folder")
    refused(prism(*both, "--only", "train"), "--only, --from: found --only train; required --only train with --from RUN")


@pytest.mark.parametrize(
    "words", [("rl", "a.yaml"), ("rl", "run", "a.yaml"), ("rl", "--nproc", "2", "a.yaml"), ("rl", "a.yaml", "steps=3")], ids=" ".join
)
def test_a_run_of_rl_needs_no_name(words: tuple[str, ...], tmp_path: Path) -> None:
    refused(prism(*words), "a.yaml", "no such file")
    call = read_command(words)
    assert call is not None and call.job == "rl" and call.config[0] == Path("a.yaml")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["train", "absent.yaml"]], ids=" ".join)
def test_what_needs_no_torch_does_not_load_it(arguments: list[str]) -> None:
    code = (
        "import sys; from megatron_prism import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print('loaded:', *{name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'megatron', 'numpy'})"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].split() == ["loaded:"], done.stderr


def test_what_would_let_a_checkpoint_run_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    refused(prism("train", "absent.yaml"), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set", "unset it", code=4)


def test_version() -> None:
    assert prism("--version").stdout == f"{__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["absent"], ["train"], ["convert", "import"], ["generate", "--prompt", "a", "--max-tokens", "0"]], ids=" ".join
)
def test_a_command_line_that_does_not_parse_is_wrong_input(arguments: list[str]) -> None:
    refused(prism(*arguments))


def test_a_dry_run_prints_the_plan_and_writes_nothing(config: Path, prepared: Path) -> None:
    before = tree(config.parent), tree(prepared)
    done = prism("train", config, "steps=7", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert {"tokens_per_step: 128", "tokens: 896", "microbatches: 4", "resumes_at_step: 0"} <= set(done.stdout.splitlines())
    assert (tree(config.parent), tree(prepared)) == before


def test_a_dry_run_refuses_held_out_data_that_are_shorter_than_a_sequence(config: Path, prepared: Path, tiny_tokenizer: Path) -> None:
    from megatron_prism.core.config import PrepareConfig, SourceConfig
    from megatron_prism.jobs import prepare

    (config.parent / "held.txt").write_text("short")
    source = SourceConfig(name="a", path=(str(prepared.parent / "a.txt"),), weight=100.0, valid_path=(str(config.parent / "held.txt"),))
    prepare.run(PrepareConfig(out=config.parent / "data", tokenizer=tiny_tokenizer, sources=(source,), num_workers=1))
    before = tree(config.parent)
    refused(
        prism("train", config, f"data.prepared={config.parent / 'data'}", "--dry-run"),
        "source a: found",
        "held-out tokens",
        "more than data.seq_length 32",
    )
    assert tree(config.parent) == before


def test_json_holds_the_whole_result(config: Path, tmp_path: Path) -> None:
    assert prism("train", config, "--dry-run", "--json", tmp_path / "plan.json").returncode == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["tokens"] == 640 and [source["name"] for source in plan["sources"]] == ["a"]
    assert not (tmp_path / "run").exists()


DEFECT = """
import os
if os.environ.get("RANK") == "1":
    from megatron_prism.train import schedule
    schedule.lr_at.__code__ = (lambda step, steps, lr, schedule: {}["planted"]).__code__
"""


def test_a_defect_in_one_rank_ends_the_gang_with_a_code_of_its_own(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank only loses its peer, which alone would be code 4 and another start."""
    (tmp_path / "sitecustomize.py").write_text(DEFECT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    done = prism("train", config, "--nproc", 2)
    assert done.returncode == 70, done.stderr
    assert "KeyError: 'planted'" in done.stderr and done.stderr.count("prism: rank 1: a defect in megatron_prism: please report it") == 1


def test_damaged_data_end_a_gang_with_the_code_of_wrong_input(config: Path, prepared: Path, tmp_path: Path) -> None:
    """With tp 2 the model itself would take ids that it has no rows for."""
    mixture = shutil.copytree(prepared, tmp_path / "damaged")
    for path in mixture.glob("*/*.train.bin"):
        path.write_bytes(b"\xf0" * path.stat().st_size)
    done = prism("train", config, f"data.prepared={mixture}", "data.num_workers=1", "parallel.tp=2", "--nproc", 2)
    refused(done, ".train.bin: document ", "found the id 61680", "of the mixture's tokenizer; compare sha256sum")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["optimizer.lrr=1"], ["override:optimizer.lrr", "did you mean 'lr'?"]),
        (["steps=many", "seed=x"], ["override:steps: found 'many'", "override:seed: found 'x'"]),
        (["parallel.tp=2"], ["parallel: found tp 2", "start 2 processes"]),
        (["parallel.tp=2", "--nproc", "3"], ["parallel: found tp 2", "world size 3"]),
        (["data.prepared=absent"], ["absent/manifest.json: found"]),
        (["data.weights={b: 100}"], ["data.weights.b: found no such source; required a source of"]),
        (["init.tokenizer=absent"], ["absent"]),
        (
            ["fp8.recipe=mxfp8", "environment.LD_PRELOAD=a.so"],
            ["fp8.recipe: found mxfp8", "Blackwell", "environment.LD_PRELOAD: found a name"],
        ),
        (["--json", "absent/plan.json"], ["absent"]),
    ],
    ids=lambda value: " ".join(value) if value[0][-1].isalnum() else None,
)
def test_a_training_run_that_does_not_hold_ends_before_it_begins(config: Path, arguments: list[str], named: list[str]) -> None:
    before = tree(config.parent)
    refused(prism("train", config, *arguments), *named)
    assert tree(config.parent) == before


def test_a_run_on_gpus_is_planned_without_one_and_not_begun(config: Path) -> None:
    before = tree(config.parent)
    on_gpus = ("precision=bf16", "fp8.recipe=tensorwise", "offload.activation_layers=1", "model.ffn_hidden_size=32", "model.kv_channels=16")
    done = prism("train", config, *on_gpus, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "expandable_segments:True" in done.stdout
    refused(
        prism("train", config, *on_gpus), "fp8: found a machine without a CUDA device", "offload.activation_layers: found a machine without"
    )
    assert tree(config.parent) == before


def test_every_line_of_a_refusal_is_a_problem(config: Path) -> None:
    done = prism("train", config, "optimizer.lr=-1", "schedule.final_factor=2")
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == ["override:optimizer.lr", "override:schedule.final_factor"]
    done = prism("train", config, "data.weights.a=-100", "--dry-run")  # the bound of a weight, and the sum: once each, though checked twice
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == ["override:data.weights.a", "override:data.weights"]


def test_what_a_step_reads_and_the_step_that_reads_it_name_each_other(config: Path) -> None:
    done = prism("locate", config, "--step", 5, "--sample", 3)
    assert done.returncode == 0 and "source: a\n" in done.stdout and "text The sum of" in done.stdout
    back = prism("locate", config, "--source", "a", "--document", 49)
    assert back.returncode == 0 and "is_read: " in back.stdout
    refused(prism("locate", config), "--step, --source: found neither")
    refused(prism("locate", config, "--step", 6, "--rank", 1, "--sample", 4), "--step: found 6", "--rank: found 1", "--sample: found 4")
    refused(prism("locate", config, "--source", "b"), "--source: found b; required a source of the run: a")


def test_what_stands_behind_two_dashes_is_the_jobs(config: Path, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("gpus_per_node: 8\n")
    job = ("train", config, "world_size=4", "--json", tmp_path / "plan.json", "--dry-run")
    done = prism("submit", "cluster.partition=long", "--cluster", tmp_path / "cluster.yaml", "--dry-run", "--", *job)
    assert done.returncode == 0, done.stderr
    assert f"    prism {' '.join(map(str, job))} --nproc 4 &\n" in done.stdout and "#SBATCH --partition=long\n" in done.stdout
    refused(prism("submit", "--cluster", tmp_path / "cluster.yaml", "--", "train", config, "--nprocs", 8), "No such option: --nprocs")
    assert not (tmp_path / "plan.json").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_a_config_that_is_absent_or_broken_is_named(tmp_path: Path, command: str) -> None:
    refused(prism(command, tmp_path / "absent.yaml"), f"{tmp_path}/absent.yaml: found no such file")
    refused(prism(command, tmp_path), f"{tmp_path}: found a folder; required a YAML config file; name the file in it")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    refused(prism(command, tmp_path / "broken.yaml"), "broken.yaml: found")


def broken(tmp_path: Path) -> Path:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "attention_bias": True}))
    return tmp_path / "hf"


def test_a_conversion_that_does_not_hold_writes_nothing(tmp_path: Path) -> None:
    root, out = broken(tmp_path), tmp_path / "out"
    before = tree(tmp_path)
    refused(
        prism("convert", "import", "--hf", root, "--out", out),
        "config.json:attention_bias: found True",
        "config.json:hidden_size: found no value",
    )
    assert tree(tmp_path) == before


def test_a_generation_without_one_model_is_refused(tmp_path: Path) -> None:
    refused(prism("generate", "--prompt", "a"), "--ckpt, --hf: found both or neither")
    refused(prism("generate", "--prompt", "a", "--ckpt", tmp_path, "--hf", tmp_path), "--ckpt, --hf")
    refused(prism("generate", "--prompt", "a", "--ckpt", tmp_path), "found no prism.json")


OWN = {  # the words of a command; RUN is a folder, FILE a config
    "config": ("rl", "mix", "FILE", "--json", "FILE"),
    "config, before it": ("rl", "mix", "--json", "FILE", "FILE"),
    "out": ("grade", "FILE", "--json", "RUN/new", "--out", "RUN/new"),
    "a result in the folder": ("rl", "samples", "RUN", "--json", "RUN/result.json"),
    "lines": ("rl", "mix", "FILE", "--json", "RUN/metrics.jsonl"),
    "a manifest": ("rl", "mix", "FILE", "--json", "RUN/manifest.json"),
}


@pytest.mark.parametrize("name", OWN)
def test_json_overwrites_no_file_but_a_result(tmp_path: Path, name: str) -> None:
    run, file = tmp_path / "run", tmp_path / "config.json"
    run.mkdir()
    file.write_text("{\n}\n")
    for other in ("result.json", "manifest.json"):
        (run / other).write_text("{\n}\n")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    words = [word.replace("RUN", str(run)).replace("FILE", str(file)) for word in OWN[name]]
    done = prism(*words)
    assert done.returncode == 2 and "prism: --json: found" in done.stderr, done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_json_overwrites_a_result(tmp_path: Path) -> None:
    for _ in range(2):
        assert prism("config", "train", "--json", tmp_path / "keys.json").returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate --hf absent --prompt a --greedy --temperature 0.5", "--greedy, --temperature: found both"),
        ("plan {config} --gpus 8 world_size=64", "--gpus: found 8, and world_size as an override"),
        ("plan {config} --response-tokens 100", "--response-tokens: found 100"),
        ("plan {config} --json -", "--json: found -; required a file"),
        (
            "merge --model runs/mid=0.15 --model runs/rl=0.85 --out out",
            "required a Hugging Face folder, a checkpoint or a run; where it is a name",
        ),
    ],
)
def test_what_would_be_left_aside_is_refused(config: Path, words: str, said: str) -> None:
    ended = prism(*words.format(config=config).split())
    assert ended.returncode == 2 and said in ended.stderr and "Traceback" not in ended.stderr, ended.stderr


def test_ranks_without_a_meeting_point_are_told_so(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK and WORLD_SIZE of an old export, or of a pod."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    ended = prism("train", config)
    assert ended.returncode == 2 and "unset RANK and WORLD_SIZE" in ended.stderr and "Traceback" not in ended.stderr, ended.stderr


def test_a_result_is_printed_before_its_file_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_prism.cli.options import finish
    from megatron_prism.core.errors import EnvironmentFault

    with pytest.raises(EnvironmentFault, match="the job itself is done"):
        finish({"loss": 0.5}, tmp_path / "absent" / "x.json")
    assert "loss: 0.5" in capsys.readouterr().out
