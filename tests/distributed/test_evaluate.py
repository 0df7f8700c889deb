"""An evaluation through kills, growth and over layouts: the same results and the same summary, byte for byte, and nothing paid for twice."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_prism.eval import folder
from megatron_prism.eval.question import read_results
from tests.distributed import toy_evaluate

pytestmark = pytest.mark.slow
NUM_QUESTIONS, FAULTY = 11, "q3"


@pytest.fixture(scope="module")
def toy(run_distributed: Callable[..., list[Any]], tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that evaluates the toy into a folder, and returns the folder."""
    home = tmp_path_factory.mktemp("evaluate")
    lines = [
        {
            "id": f"q{n}",
            "kind": "math",
            "prompt": f"The sum of {n} and" + " and" * (n % 4),
            "gold": "fault" if f"q{n}" == FAULTY else "1",
            "tags": {"parity": "odd" if n % 2 else "even"},
        }
        for n in range(NUM_QUESTIONS)
    ]
    (home / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(name: str, num_ranks: int = 1, **values: Any) -> Path:
        given = {"checkpoint": tiny_checkpoint, "file": home / "set.jsonl", **values}
        run_distributed(toy_evaluate.run, num_ranks, timeout_s=120, out=home / name, parallel=values.get("grid", {}), **given)
        return home / name

    run.home = home  # type: ignore[attr-defined]
    return run


@pytest.fixture(scope="module")
def unbroken(toy: Callable[..., Path]) -> Path:
    return toy("unbroken")


def texts(root: Path) -> tuple[str, str]:
    return (root / folder.RESULTS).read_text(), (root / folder.SUMMARY).read_text()


def paid(root: Path, what: str) -> Counter[tuple[Any, ...]]:
    """Return how often each response was sampled, or graded, over all starts. Faults are graded at each start, and left out."""
    lines = [json.loads(line) for line in Path(f"{root}.log").read_text().splitlines()]
    return Counter(tuple(rest) for kind, *rest in lines if kind == what and (what == "sampled" or rest[1] != FAULTY))


def test_every_response_is_scored_and_a_fault_is_none(unbroken: Path) -> None:
    """Traps 1, 5 and 6: each response has its own seed and its own grade, joined by id; a fault is masked and counted, and is no 0."""
    results = list(read_results(unbroken / folder.RESULTS))
    assert [(one.id, one.sample) for one in results] == [(f"q{n}", sample) for n in range(NUM_QUESTIONS) for sample in range(3)]
    assert len({one.seed for one in results}) == len(results) and len({one.text for one in results}) > NUM_QUESTIONS
    assert all(one.why == one.text.strip() or one.why == one.text for one in results)  # the toy's reason is the response that it graded
    assert {one.score for one in results if one.id != FAULTY} == {0.0, 1.0} and {one.score for one in results if one.id == FAULTY} == {None}
    part = folder.summary_of(unbroken)["tasks"]["sums"]
    judged = [one.score for one in results if one.id != FAULTY]
    assert part["num_faults"] == 3 and part["masked_questions"] == [FAULTY] and part["outcomes"]["fault"] == 3 / 33
    assert part["score"] == pytest.approx(sum(judged) / 30) and part["score"] != pytest.approx(sum(judged) / 33)  # type: ignore[arg-type]
    assert set(part["pass_at"]) == {"1", "2", "3"} and set(part["by"]["parity"]) == {"odd", "even"}
    assert set(paid(unbroken, "sampled").values()) == set(paid(unbroken, "graded").values()) == {1}


@pytest.mark.parametrize("point", list(toy_evaluate.POINTS))
def test_an_evaluation_killed_at_a_point_ends_as_an_unbroken_one(toy: Callable[..., Path], unbroken: Path, point: str) -> None:
    with pytest.raises(AssertionError, match="exit code -9"):
        toy(f"at-{point}", point=point)
    root = toy(f"at-{point}")
    assert texts(root) == texts(unbroken)
    assert set(paid(root, "sampled").values()) == {1} and len(paid(root, "sampled")) == 33
    assert set(paid(root, "graded").values()) == {1} and len(paid(root, "graded")) == 30


def test_kills_at_any_time_change_nothing(toy: Callable[..., Path], unbroken: Path) -> None:
    draw, kills = random.Random(7), 0
    for _ in range(20):
        try:
            toy("any-time", delay_s=draw.uniform(0.02, 0.12))
            break
        except AssertionError as error:
            assert "exit code -9" in str(error)
        kills += 1
    root = toy("any-time")
    assert kills and texts(root) == texts(unbroken)
    assert set(paid(root, "sampled").values()) == {1} == set(paid(root, "graded").values())


def test_a_signal_ends_it_after_its_shard(toy: Callable[..., Path], unbroken: Path) -> None:
    with pytest.raises(AssertionError, match="Stopped: stopped by SIGTERM: 2 of 4 shards are sampled"):
        toy("stopped", point="written", by="SIGTERM")
    root = toy("stopped")
    assert texts(root) == texts(unbroken) and set(paid(root, "graded").values()) == {1}


@pytest.mark.parametrize("grid", [{"tp": 1}, {"pp": 2}, {"tp": 2}], ids=["dp2", "pp2", "tp2"])
def test_a_layout_evaluates_as_one_process(toy: Callable[..., Path], unbroken: Path, grid: dict[str, int]) -> None:
    assert texts(toy("-".join(map(str, grid.items())), 2, grid=grid, shard_responses=5, num_rows=3)) == texts(unbroken)


def test_a_killed_evaluation_goes_on_with_another_layout(toy: Callable[..., Path], unbroken: Path) -> None:
    with pytest.raises(AssertionError, match="exit code -9"):
        toy("moved", 2, grid={"tp": 1}, point="written")
    root = toy("moved", shard_responses=4)
    assert texts(root) == texts(unbroken) and set(paid(root, "sampled").values()) == {1}


def test_growth_costs_only_what_is_new(toy: Callable[..., Path], unbroken: Path) -> None:
    root = toy("grown", task={"num_samples": 1, "limit": 5})
    assert len(paid(root, "sampled")) == 5
    toy("grown", task={"num_samples": 2, "limit": 5})
    assert len(paid(root, "sampled")) == 10
    toy("grown")
    assert texts(root) == texts(unbroken)
    assert set(paid(root, "sampled").values()) == {1} and set(paid(root, "graded").values()) == {1}
    other = toy("reseeded", seed=5)
    assert texts(other)[0] != texts(unbroken)[0]  # the control: another seed is seen


def test_a_changed_response_is_never_trusted(toy: Callable[..., Path], unbroken: Path) -> None:
    root = toy("changed")
    path = root / folder.SAMPLES / "000001.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0].replace('"text": "', '"text": "1234'), *lines[1:]]))
    toy("changed")
    assert texts(root) == texts(unbroken)
    assert sorted(paid(root, "sampled").values()) == [1] * 32 + [2]  # that one alone is sampled again, and graded as before


def test_another_model_is_refused_and_so_is_an_engine_that_is_not_the_model(
    toy: Callable[..., Path], unbroken: Path, make_checkpoint: Callable[..., Path]
) -> None:
    other = make_checkpoint("llama", initializer_range=0.2)
    with pytest.raises(AssertionError, match="InputError: out .*whose weights differ"):
        toy("unbroken", checkpoint=other)
    assert texts(unbroken)
    with pytest.raises(AssertionError, match="ResultFailure: sampler and trainer disagree"):
        toy("off", off=True)
    assert not (toy.home / "off" / folder.SAMPLES).exists()  # type: ignore[attr-defined]


def test_ruler_and_the_held_out_loss_are_the_same_on_two_ranks(
    toy: Callable[..., Path], tiny_mixture: Path, make_checkpoint: Callable[..., Path]
) -> None:
    """Trap 9: RULER's lengths are those of the model's own tokens, prompt and response together."""
    ruler = {"lengths": [768, 1024], "sub_tasks": ["niah_single_1", "niah_multikey_2"], "num_questions": 2}
    held_out = {"mixture": str(tiny_mixture), "seq_length": 32, "sequences": 6}
    tasks = {"long": {"set": "ruler", "ruler": ruler}, "losses": {"held_out": held_out}}
    given = {"checkpoint": make_checkpoint("llama", max_position_embeddings=1024)}
    alone, two = toy("own-1", tasks=tasks, **given), toy("own-2", 2, tasks=tasks, grid={"tp": 1}, **given)
    assert (alone / folder.RESULTS).read_text() == (two / folder.RESULTS).read_text()
    parts = [folder.summary_of(root)["tasks"] for root in (alone, two)]
    assert parts[0]["long"] == parts[1]["long"] and set(parts[0]["long"]["by"]["length"]) == {"768", "1024"}
    for source, loss in parts[0]["losses"]["losses"].items():
        assert loss == pytest.approx(parts[1]["losses"]["losses"][source], rel=1e-5) and loss["loss"] > 0
    assert parts[0]["losses"]["score"] is None and set(parts[0]["losses"]["losses"]) == {"math", "code"}
    again = toy("own-1", tasks={**tasks, "losses": {"held_out": {**held_out, "sequences": 4}}}, **given)
    assert folder.summary_of(again)["tasks"]["losses"]["losses"]["math"]["num_sequences"] == 4
    assert set(paid(again, "sampled").values()) == {1}
    with pytest.raises(AssertionError, match=r"tasks.long.ruler.lengths: found 100000; required at most the model's context"):
        toy("too-long", tasks={"long": {"set": "ruler", "ruler": {"lengths": [100000]}}})


class Server(BaseHTTPRequestHandler):
    """Answers with as many digits as its prompt has words, and fails on one prompt."""

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        status = 500 if prompt.startswith("The sum of 5") else 200
        choice = {"text": "1" * (len(prompt.split()) - 3), "finish_reason": "stop"}
        data = json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


def test_a_model_behind_an_endpoint_is_evaluated_as_one_here(toy: Callable[..., Path]) -> None:
    """Trap 5: a server's fault is retried, then masked and counted, and the next start tries it again."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        served = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "num_retries": 0}
        root = toy("served", model={"endpoint": served}, task={"num_samples": 1})
        results = {one.id: one for one in read_results(root / folder.RESULTS)}
        scores = {id: one.score for id, one in results.items() if one.score is not None}
        assert scores == {f"q{n}": float(n % 4 >= 1) for n in range(NUM_QUESTIONS) if n not in (3, 5)}
        assert results["q5"].outcome == "fault" and results["q5"].why.startswith("HTTP 500") and results["q5"].text == ""
        summary = folder.summary_of(root)
        assert summary["tasks"]["sums"]["masked_questions"] == ["q3", "q5"] and summary["model"]["kind"] == "endpoint"
        before = texts(root)
        assert texts(toy("served", model={"endpoint": served}, task={"num_samples": 1})) == before
        assert {id: count for (_, id, _), count in paid(root, "sampled").items() if count > 1} == {"q5": 2}
        server.shutdown()


def test_lm_evals_tasks_are_measured_once(
    toy: Callable[..., Path],
) -> None:
    home = toy.home  # type: ignore[attr-defined]
    (home / "lambada.jsonl").write_text("".join(json.dumps({"text": f"The sum of {n} and 1 is {n + 1}"}) + "\n" for n in range(12)))
    words = {"lm_eval": {"names": ["lambada_openai"], "files": {"lambada_openai": str(home / "lambada.jsonl")}}, "limit": 11}
    tasks = {"words": words}
    root = toy("lm-1", tasks=tasks)
    part = folder.summary_of(root)["tasks"]["words"]
    results = [one for one in read_results(root / folder.RESULTS) if one.task == "lm_eval/lambada_openai"]
    assert len(results) == part["num_questions"] == 11 and folder.summary_of(root)["versions"]["lm_eval"] == part["lm_eval"]["version"]
    before = texts(root)
    assert texts(toy("lm-2", 2, tasks=tasks, grid={"tp": 1})) == before
    for path in (root / folder.TASKS).iterdir():
        path.unlink()  # as if killed before it was whole: lm-eval's own answers are there
    assert texts(toy("lm-1", tasks=tasks)) == before


@pytest.mark.parametrize(("decision", "policy"), [("GO", {"max_drop": {"sums": 0.5}}), ("NO-GO", {"min_gain": {"sums": 0.5}})])
def test_an_evaluation_is_held_against_another(toy: Callable[..., Path], unbroken: Path, decision: str, policy: dict[str, Any]) -> None:
    held = toy(decision, against=str(unbroken), policy={**policy, "min_pairs": 5})
    assert json.loads((held / "verdict.json").read_text())["decision"] == decision and texts(held) == texts(unbroken)


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("llama", {"tp": 2}),
        ("llama", {"pp": 2}),
        ("granite", {"pp": 2}),
        ("nemotron", {"tp": 2}),
        ("nemotron", {"pp": 2}),
        ("granite_h", {"pp": 2}),
    ],
)
def test_a_hugging_face_folder_is_loaded_as_its_checkpoint_is(
    run_distributed: Callable[..., list[Any]], make_checkpoint: Callable[..., Path], name: str, grid: dict[str, int]
) -> None:
    checkpoint = make_checkpoint(name)
    given = {"hf": checkpoint.parent / "hf", "checkpoint": checkpoint, "grid": grid, "parallel": grid}
    assert run_distributed(toy_evaluate.differing, 2, control=False, **given) == [[], []]
    if grid == {"tp": 2}:
        assert all(len(names) == 1 for names in run_distributed(toy_evaluate.differing, 2, control=True, **given))


def test_a_nan_in_a_hugging_face_folder_is_refused(
    run_distributed: Callable[..., list[Any]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    hf = shutil.copytree(tiny_checkpoint.parent / "hf", tmp_path / "hf")
    assert run_distributed(toy_evaluate.refusal, 1, hf=hf) == [""]  # the control: as it was
    weights = load_file(hf / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 3] = float("nan")
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    (said,) = run_distributed(toy_evaluate.refusal, 1, hf=hf)
    assert "model.layers.1.mlp.up_proj.weight" in said and "nan at [0, 3]" in said
