"""NeMo-Aligner's own code against ours. `bash tools/test_nemo_aligner.sh` makes its environment and runs this; elsewhere it is skipped.

PRISM_NEMO_ALIGNER: the Python of that environment. PRISM_NEMO_ALIGNER_REPO: a checkout of NeMo-Aligner, for its config.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prism.core.config import AlignerConfig, ClusterConfig
from megatron_prism.data import tokenizer
from megatron_prism.grade.outcome import Graded, Item
from megatron_prism.jobs import aligner
from megatron_prism.rl.aligner import answers

PYTHON, REPO = os.environ.get("PRISM_NEMO_ALIGNER"), os.environ.get("PRISM_NEMO_ALIGNER_REPO", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs NeMo-Aligner's environment: bash tools/test_nemo_aligner.sh"),
]
NUM = 8
# Two groups in one batch: 4 samples of one prompt, of which one did not end; 3 of another, of which one ended.
GROUPS = {
    "group_prompts": [[1, 2, 0]] * 4 + [[1, 3, 0]] * 3,
    "group_rewards": [1.0, 0.0, 1.0, 0.5, 1.0, 0.0, 0.0],
    "ended": [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0],
    "logprobs": [[-1.0, -2.0, -0.5, -0.25], [-0.5, -1.5, -1.0, -3.0]],
    "reference_logprobs": [[-1.5, -1.0, -0.5, -0.5], [-0.25, -1.0, -2.0, -1.0]],
    "prompt_lengths": [2, 1],
    "response_lengths": [5, 3],
}


def is_gold(items: Sequence[Item]) -> dict[str, Graded]:
    return {item.id: Graded(id=item.id, outcome="right" if item.response.strip() == item.gold else "wrong") for item in items}


@pytest.fixture(scope="module")
def case(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what NeMo-Aligner is given."""
    root = tmp_path_factory.mktemp("aligner")
    records = [{"id": f"p{n}", "domain": "math", "kind": "math", "prompt": f"What is {n} + 1?\n", "gold": str(n + 1)} for n in range(NUM)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = AlignerConfig(
        checkpoint=tiny_checkpoint,
        nemo="/w/it (1).nemo",
        prompts=root / "prompts.jsonl",
        image="a",
        results="/w/results",
        num_prompts=NUM,
        num_samples=4,
        rollout_micro_batch_size=1,
        seq_length=64,
        max_prompt_tokens=32,
        steps=10,
    )
    aligner.export(config, ClusterConfig(gpus_per_node=2), root / "out")
    spec = tokenizer.load(root / "out" / aligner.TOKENIZER)
    rows = [[*tokenizer.encode_prompt(record["prompt"], spec), *tokenizer.encode_text(str(6), spec), spec.eos_id] for record in records]
    sched = {"name": "PolynomialDecayAnnealing", "power": 1.0, "warmup_steps": 0, "min_lr": 0.0}
    sizes = {"seq_length": 64, "pad_to": 64, "lr": 5e-7, "sched": sched, "steps": 10}
    return {"folder": str(root / "out"), "rows": rows, "repo": REPO, **sizes, **GROUPS}


@pytest.fixture(scope="module")
def theirs(case: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what NeMo-Aligner's code gave, asked of a server of ours."""
    assert PYTHON is not None
    server = aligner.open_server(Path(case["folder"]), is_gold, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    root = tmp_path_factory.mktemp("theirs")
    (root / "case.json").write_text(json.dumps({**case, "port": server.server_port}))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [PYTHON, str(Path(__file__).parent / "theirs.py"), root / "case.json", root / "result.json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads((root / "result.json").read_text())
    print(json.dumps({"versions": result["versions"], "per_call_s": result["served"]["per_call_s"]}))
    return result


def test_its_client_gets_its_rewards(theirs: dict[str, Any]) -> None:
    assert theirs["served"]["rewards"] == [[float(n + 1 == 6)] for n in range(NUM)]
    assert theirs["served"]["dtype"] == "float32"
    assert "begins with no prompt" in theirs["served"]["unknown_prompt"]


def test_its_data_set_gives_the_tokens_of_the_answer_table(theirs: dict[str, Any], case: dict[str, Any]) -> None:
    table = answers.read(Path(case["folder"]) / aligner.ANSWERS)
    items = theirs["data_set"]
    assert len(items) == 3 * NUM and {tuple(sorted(item)) for item in items} == {("length", "loss_multiplier", "text")}  # no gold
    assert [table.by_key[answers.key(item["text"])].id for item in items] == 3 * [f"p{n}" for n in range(NUM)]
    assert all(item["loss_multiplier"] for item in items)


def test_its_baseline_is_leave_one_out_over_what_ended(theirs: dict[str, Any]) -> None:
    def baseline(of_others: bool) -> list[float]:
        rewards, ended = np.array(GROUPS["group_rewards"]), np.array(GROUPS["ended"])
        groups = np.array([str(row) for row in GROUPS["group_prompts"]])
        values = rewards.copy()  # a group with at most one that ended has no advantage
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            if ended[rows].sum() > 1:
                total = (rewards * ended)[rows].sum()
                values[rows] = (total - of_others * (rewards * ended)[rows]) / (ended[rows].sum() - of_others)
        return [float(value) for value in values]

    assert theirs["arithmetic"]["baseline"] == pytest.approx(baseline(True), abs=1e-7)
    assert theirs["arithmetic"]["baseline"] != pytest.approx(baseline(False), abs=1e-3)  # the group's mean is another


def test_its_kl_and_mask(theirs: dict[str, Any]) -> None:
    difference = np.array(GROUPS["logprobs"]) - np.array(GROUPS["reference_logprobs"])
    np.testing.assert_allclose(theirs["arithmetic"]["kl"], difference, atol=1e-7)
    np.testing.assert_allclose(theirs["arithmetic"]["kl_abs"], np.abs(difference), atol=1e-7)
    assert theirs["arithmetic"]["mask"] == [[0, 1, 1, 1], [1, 1, 0, 0]]  # of the responses' tokens alone


def test_its_schedule_is_linear(theirs: dict[str, Any]) -> None:
    np.testing.assert_allclose(theirs["learning_rates"], [5e-7 * (1 - step / 10) for step in range(10)], rtol=1e-6)


@pytest.mark.skipif(not REPO, reason="PRISM_NEMO_ALIGNER_REPO names no checkout of NeMo-Aligner: its wheel has no examples/")
def test_hydra_takes_the_words(theirs: dict[str, Any], case: dict[str, Any]) -> None:
    settings = theirs["settings"]
    model, reinforce = settings["model"], settings["trainer"]["reinforce"]
    assert settings["pretrained_checkpoint"]["restore_from_path"] == "/w/it (1).nemo"
    assert model["data"]["data_prefix"]["test"] == [f"{case['folder']}/test.jsonl"]
    assert model["optim"]["sched"] == case["sched"] and model["optim"]["lr"] == 5e-7
    assert model["global_batch_size"] == NUM * 4 * 2 and model["reinforce"]["num_rollout_samples"] == NUM
    assert model["reinforce"]["length_params"]["max_length"] == 32 and reinforce["trt_llm"]["max_input_len"] == 32
    assert reinforce["num_rollouts_per_prompt"] == 4 and reinforce["max_steps"] == 10 and reinforce["initial_policy_kl_penalty"] == 0.05
    assert settings["remote_rm"] == {"pad_to_length": 64, "reward_model": {"name": "reward_model", "ip": "127.0.0.1", "port": 5555}}
    assert model["reinforce"]["sampling_params"]["end_strings"] == ["</s>"]
