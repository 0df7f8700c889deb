"""`prism aligner export`: the folder, what is refused before it is written, and that no shell or Hydra changes a word."""

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

from megatron_prism.core.config import AlignerConfig, ClusterConfig, ContainerConfig
from megatron_prism.core.errors import InputError
from megatron_prism.jobs import aligner
from megatron_prism.rl.aligner import answers, overrides, preflight, prompts
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
        ({"kind": "code", "tests": {"kind": "eval"}}, "kind: stdin"),
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
    command = ["aligner", "export", tmp_path / "run.yaml", "--cluster", tmp_path / "cluster.yaml", "--out", tmp_path / "out", "steps=7"]
    done = subprocess.run([sys.executable, "-m", "megatron_prism.cli", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trainer.reinforce.max_steps=7\n" in (tmp_path / "out/overrides.txt").read_text()
    assert "#SBATCH --constraint=h100\n" in (tmp_path / "out/job.sbatch").read_text()
