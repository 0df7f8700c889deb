"""`prism rl export nemo_aligner`: the folder, what is refused before it is written, and that no shell or Hydra changes a word."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prism.cli.submit import read_command
from megatron_prism.core.config import (
    AlgorithmConfig,
    AlignerConfig,
    ClusterConfig,
    ContainerConfig,
    InitConfig,
    ParallelConfig,
    ReferenceConfig,
    RLConfig,
)
from megatron_prism.core.config.rl import PackedBatchConfig, RolloutConfig
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import to_dict
from megatron_prism.core.manifest import sha256_file, write_json
from megatron_prism.jobs import aligner
from megatron_prism.launch.pipeline import call_of
from megatron_prism.rl.aligner import answers, from_rl, overrides, preflight, prompts
from megatron_prism.rl.aligner.prompts import Prompt

CLUSTER = ClusterConfig(gpus_per_node=8, account="a b", container=ContainerConfig(image="/images/prism.sqsh", mounts=("/w:/w",)))
RECORDS: list[dict[str, Any]] = [
    {"id": f"p{number}", "domain": "math", "kind": "math", "prompt": f"What is {number} + 1?\n", "gold": str(number + 1)}
    for number in range(8)
]
Make = Callable[..., AlignerConfig]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def make(tmp_path: Path, tiny_checkpoint: Path) -> Make:
    def of(records: list[dict[str, Any]] = RECORDS, **changes: Any) -> AlignerConfig:
        sizes = {"num_prompts": 8, "num_samples": 4, "rollout_micro_batch_size": 1, "tp": 2, "seq_length": 64, "max_prompt_tokens": 32}
        values = {"checkpoint": tiny_checkpoint, "nemo": "/w/a (1).nemo", "image": "nvcr.io#a:b", "results": "/w/results", **sizes}
        return AlignerConfig(prompts=write(tmp_path / "prompts.jsonl", records), **{**values, **changes})

    return of


def test_the_folder_of_a_run(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "a folder's"
    result = aligner.export(make([*RECORDS, {**RECORDS[0], "id": "again"}]), CLUSTER, out)
    assert result["prompts"] == 8 and result["data_parallel"] == 4
    assert result["global_batch_size"] == 8 * 4 * 4  # makes up for chunk, which ignores its rank
    lines = [json.loads(line)["text"] for line in (out / "train.jsonl").read_text().splitlines()]
    assert lines == [record["prompt"] for record in RECORDS]
    assert (out / "test.jsonl").read_bytes() == (out / "validation.jsonl").read_bytes() == (out / "train.jsonl").read_bytes()
    assert len(answers.read(out / aligner.ANSWERS).by_key) == 8
    for name in ("job.sbatch", "actor.sh", "convert.sh"):
        subprocess.run(["bash", "-n", out / name], check=True)
    script = (out / "job.sbatch").read_text()
    first, second = script.split("#SBATCH hetjob\n")
    assert '#SBATCH --account="a b"' in first and '#SBATCH --account="a b"' in second and "--gres=gpu:8" not in second
    assert f"folder={shlex.quote(str(out))}" in script and "PRISM_REWARD_TOKEN=" in script
    assert all(defect in (out / "README.md").read_text() for defect in preflight.DEFECTS)


def test_a_table_of_answers_is_read_as_it_was_written(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    aligner.export(make([{**record, "gold": f"{record['gold']}\u2028or so"} for record in RECORDS]), CLUSTER, out)
    assert sorted(one.gold for one in answers.read(out / aligner.ANSWERS).by_key.values()) == [f"{n}\u2028or so" for n in range(1, 9)]


def test_a_dry_run_writes_nothing(make: Make, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    config = make()
    aligner.export(config, CLUSTER, tmp_path / "out", dry_run=True)
    assert sorted(tmp_path.iterdir()) == sorted([*before, config.prompts])


def test_the_actor_gets_the_words_as_they_were_written(make: Make, tmp_path: Path) -> None:
    repo, out = tmp_path / "repo", tmp_path / "out"
    (repo / "examples/nlp/gpt").mkdir(parents=True)
    (repo / "examples/nlp/gpt/train_gpt_reinforce_actor.py").write_text(
        "import json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))"
    )
    aligner.export(make(repo=str(repo)), CLUSTER, out)
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "SLURM_LOCALID": "1", "PRISM_REWARD_TOKEN": "secret"}
    done = subprocess.run(["bash", out / "actor.sh"], capture_output=True, text=True, env=environment, check=True)
    words, seen = json.loads(done.stdout)
    assert words == (out / "overrides.txt").read_text().splitlines()
    assert "PRISM_REWARD_TOKEN" not in seen and seen["NCCL_ALGO"] == "Tree"
    assert "pretrained_checkpoint.restore_from_path='/w/a (1).nemo'" in words
    assert "model.reinforce.sampling_params.end_strings=['</s>']" in words and "model.optim.lr=5e-07" in words
    assert "trainer.reinforce.max_epochs=1000" in words  # 1,000 steps of 8 prompts, of which there are 8


def test_a_text_in_hydras_grammar() -> None:
    assert overrides.written("it's") == r"'it\'s'" and overrides.written([True, 1e-7, {"a": "b"}]) == "[true,1e-07,{a:'b'}]"
    with pytest.raises(ValueError):
        overrides.written("${oc.env:HOME}")


def test_a_patched_chunk_needs_no_larger_batch(make: Make) -> None:
    assert overrides.global_batch_size(make(is_chunk_patched=True), 4) == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp": 3}, "a product that divides the GPUs"),
        ({"rollout_micro_batch_size": 3}, "num_prompts a multiple"),
        ({"max_prompt_tokens": 33}, "at most half of seq_length"),
        ({"max_prompt_tokens": 4}, "at most max_prompt_tokens 4"),
        ({"nemo": "relative"}, "an absolute path"),
        ({"nemo": "/w/it's"}, "without quotes"),
        ({"num_prompts": 16}, "8 distinct prompts"),
    ],
)
def test_what_cannot_run_is_refused(make: Make, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        aligner.export(make(**changes), CLUSTER, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_nemo_aligner_lacks(
    make: Make, nemotron_checkpoint: Path, granite_checkpoint: Path, mistral_checkpoint: Path, tmp_path: Path
) -> None:
    for checkpoint, message in (
        (nemotron_checkpoint, "a hybrid with Mamba layers"),
        (granite_checkpoint, "the family granite"),
        (mistral_checkpoint, "a sliding window of 11 tokens"),
    ):
        with pytest.raises(InputError, match=message):
            aligner.export(make(checkpoint=checkpoint), CLUSTER, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gold": None}, "gold: found None"),
        ({"kind": "poem"}, "one of math, choice, code"),
        ({"answer": 1}, "the keys answer"),
        ({"kind": "choice", "gold": "C", "choices": ["a", "b"]}, "A to B"),
        ({"kind": "code", "tests": {"kind": "eval"}}, "no kind stdin, call or asserts"),
        ({"id": "p1"}, "an id of its own"),
        ({"prompt": RECORDS[1]["prompt"]}, "one answer for a prompt"),
        ({"prompt": "What is"}, "the beginning of prompt"),
    ],
)
def test_a_bad_prompt_is_named(make: Make, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        aligner.export(make([{**RECORDS[0], **changes}, *RECORDS[1:]]), CLUSTER, tmp_path / "out")


def test_a_prompt_is_found_at_its_own_length_and_at_no_other() -> None:
    two = [Prompt(id=name, domain="d", kind="math", prompt=name, gold=name) for name in "ab"]
    table = answers.table(two, [[1, 2, 3], [1, 4]])
    one, other = table.find(np.array([1, 2, 3, 9])), table.find(np.array([1, 4]))
    assert one is not None and (one[0].id, one[1]) == ("a", 3) and other is not None and other[0].id == "b"
    assert table.find(np.array([1, 2])) is None and table.find(np.array([2, 2, 3])) is None


def test_a_begin_of_text_token_is_spelled_out(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """NeMo's text_to_ids adds no token: the text has to hold the one that the tokenizer would add."""
    from tokenizers import Tokenizer, processors

    from megatron_prism.data import tokenizer

    model = Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes((tiny_tokenizer / "tokenizer_config.json").read_bytes())
    spec = tokenizer.load(tmp_path)
    texts, ids = prompts.texts([Prompt(id="a", domain="d", kind="math", prompt="2 + 3", gold="5")], spec, 99, tmp_path)
    assert texts == ["<s>2 + 3"] and ids[0][0] == 1 and ids[0] == tokenizer.encode_prompt("2 + 3", spec)


def test_an_answer_table_that_was_changed_is_not_served(make: Make, tmp_path: Path) -> None:
    aligner.export(make(), CLUSTER, tmp_path / "out")
    table = tmp_path / "out" / aligner.ANSWERS
    table.write_text(table.read_text().replace('"gold": "1"', '"gold": "2"'))
    with pytest.raises(InputError, match="changed since the export"):
        aligner.open_server(tmp_path / "out", lambda items: {}, "127.0.0.1", 0)
    with pytest.raises(InputError, match="absent: found no such folder; .*; prism rl export nemo_aligner makes one$"):
        aligner.open_server(tmp_path / "absent", lambda items: {}, "127.0.0.1", 0)


SERVE = """
import sys
from pathlib import Path
from megatron_prism.core import log
from megatron_prism.jobs import aligner

log.setup()
server = aligner.open_server(Path(sys.argv[1]), lambda items: {}, "127.0.0.1", 0)
print(server.server_port, flush=True)
aligner.serve(server)
print("stopped", flush=True)
"""


def test_sigterm_stops_a_server_cleanly(make: Make, tmp_path: Path) -> None:
    aligner.export(make(), CLUSTER, tmp_path / "out")
    with subprocess.Popen([sys.executable, "-c", SERVE, tmp_path / "out"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/live", timeout=20) as answer:
            assert answer.status == 200
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "stopped\n" and process.wait(20) == 0
        assert time.monotonic() - start < 10


def test_the_command_line(make: Make, tmp_path: Path) -> None:
    from megatron_prism.core.load import to_yaml

    (tmp_path / "run.yaml").write_text(to_yaml(make()))
    (tmp_path / "cluster.yaml").write_text(to_yaml(replace(CLUSTER, sbatch=("--constraint=h100",))))
    command = [
        "rl",
        "export",
        "nemo_aligner",
        tmp_path / "run.yaml",
        "--cluster",
        tmp_path / "cluster.yaml",
        "--out",
        tmp_path / "out",
        "steps=7",
    ]
    done = subprocess.run([sys.executable, "-m", "megatron_prism.cli", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trainer.reinforce.max_steps=7\n" in (tmp_path / "out/overrides.txt").read_text()
    assert "#SBATCH --constraint=h100\n" in (tmp_path / "out/job.sbatch").read_text()


RL = RLConfig(
    run_dir=Path("r"),
    steps=20,
    world_size=16,
    prompts=Path("set"),
    rollout=RolloutConfig(max_tokens=32, num_prompts=16, num_samples=4),
    batch=PackedBatchConfig(seq_length=64),
    algorithm=AlgorithmConfig(advantage="rloo"),
    reference=ReferenceConfig(interval=0),
    init=InitConfig(checkpoint=Path("c")),
    parallel=ParallelConfig(tp=2, pp=2),
)


def rl_yaml(tmp_path: Path, checkpoint: Path) -> tuple[Path, Path]:
    """Write an RL config, its prompts and a cluster; return the YAMLs."""
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "prompts.jsonl", [{**RECORDS[0], "id": f"q{at}", "prompt": f"What is {at} x 1?\n"} for at in range(16)])
    write_json(tmp_path / "set" / "manifest.json", {"kind": "prompts", "sha256": sha256_file(tmp_path / "set" / "prompts.jsonl")})
    values = {**to_dict(RL), "prompts": str(tmp_path / "set"), "init": {"checkpoint": str(checkpoint)}}
    (tmp_path / "rl.yaml").write_text(json.dumps(values))
    (tmp_path / "cluster.yaml").write_text('{"gpus_per_node": 8}')
    return tmp_path / "rl.yaml", tmp_path / "cluster.yaml"


def test_an_rl_run_is_exported_as_its_own_config_would_be(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config, cluster = rl_yaml(tmp_path, tiny_checkpoint)
    command = [sys.executable, "-m", "megatron_prism.cli", "rl", config, "--backend", "nemo_aligner", "--cluster", cluster]
    command += ["--out", tmp_path / "out", "aligner.image=nvcr.io#a:b", "rollout.num_prompts=8", "--json", tmp_path / "result.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "out" / "overrides.txt").read_text().splitlines()
    for word in (
        "trainer.num_nodes=2",
        "++model.tensor_model_parallel_size=2",
        "++model.pipeline_model_parallel_size=2",
        "trainer.reinforce.initial_policy_kl_penalty=0.05",
        "trainer.reinforce.max_steps=20",
        "trainer.reinforce.num_rollouts_per_prompt=4",
        "model.reinforce.num_rollout_samples=8",
        "++model.reinforce.length_params.max_length=32",
        "model.reinforce.rollout_micro_batch_size=1",  # 8 ranks sample 8 prompts
        "model.optim.lr=5e-07",
        f"pretrained_checkpoint.restore_from_path='{tmp_path}/out/model.nemo'",
    ):
        assert word in words, word
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["prompts"] == 16 and result["not_carried"] == list(from_rl.NOT_CARRIED)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"algorithm": AlgorithmConfig()}, "algorithm.advantage"),
        ({"algorithm": AlgorithmConfig(advantage="rloo", loss="gspo")}, "algorithm.loss"),
        ({"algorithm": AlgorithmConfig(advantage="rloo", stop_penalty=0.1)}, "algorithm.stop_penalty"),
        ({"reference": ReferenceConfig()}, "reference.interval"),
        ({"world_size": 12}, "world_size"),
        ({"init": InitConfig()}, "init.checkpoint"),
        ({"trainable": ("*.self_attention.*",)}, "trainable"),
        ({"rollout": replace(RL.rollout, lag=1)}, "rollout.lag"),
        ({"batch": replace(RL.batch, num_minibatches=2)}, "batch.num_minibatches"),
        ({"schedule": replace(RL.schedule, warmup_steps=1)}, "schedule.warmup_steps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_nemo_aligner_has_no_equal_of_is_refused(changes: dict[str, Any], where: str) -> None:
    assert list(from_rl.problems(RL, 8)) == []
    assert [problem.where for problem in from_rl.problems(replace(RL, **changes), 8)] == [where]


def test_all_that_is_refused_is_said_at_once_and_nothing_is_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config, cluster = rl_yaml(tmp_path, tiny_checkpoint)
    with pytest.raises(InputError) as caught:
        aligner.run_rl(config, ["algorithm.advantage=grpo", "reference.interval=1"], cluster, tmp_path / "out")
    assert "override:algorithm.advantage: found grpo" in str(caught.value) and "override:reference.interval" in str(caught.value)
    with pytest.raises(InputError, match="aligner.image: found no value"):
        aligner.run_rl(config, [], cluster, tmp_path / "out")
    with pytest.raises(InputError, match="tpp: found an unknown key"):
        aligner.run_rl(config, ["aligner.image=a", "aligner.tpp=1"], cluster, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_set_that_is_not_as_its_manifest_says_is_not_exported(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config, cluster = rl_yaml(tmp_path, tiny_checkpoint)
    with (tmp_path / "set" / "prompts.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(InputError, match=r"prompts.jsonl: found sha256 .* as its manifest says"):
        aligner.run_rl(config, ["aligner.image=a", "rollout.num_prompts=8"], cluster, tmp_path / "out")
    (tmp_path / "set" / "manifest.json").unlink()
    with pytest.raises(InputError, match="required a prompt set"):
        aligner.run_rl(config, ["aligner.image=a", "rollout.num_prompts=8"], cluster, tmp_path / "out")


def test_backend_options_go_together() -> None:
    for words in (["--backend", "nemo_aligner"], ["--out", "o"]):
        done = subprocess.run(
            [sys.executable, "-m", "megatron_prism.cli", "rl", "a.yaml", *words], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2 and "--out" in done.stderr, done.stderr
    with pytest.raises(InputError, match="no --backend"):
        call_of(["rl", "a.yaml", "--backend", "nemo_aligner"], read_command)
