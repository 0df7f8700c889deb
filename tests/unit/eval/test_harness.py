"""lm-eval's tasks on a scripted model: what is refused before it is asked, and the traps that need no weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prism.core.errors import CheckpointError, InputError
from megatron_prism.data import tokenizer
from megatron_prism.eval.retention import harness, lm_files, lm_tasks
from megatron_prism.eval.retention.serve import Row
from megatron_prism.generate.engine import Rollout, Sampling, ids_of, logprobs_of


class Scripted:
    """A model in place of serve.Served: it likes choices by their tokens' sum, and says the same text to every prompt."""

    longest, batch_tokens, num_rows = 4096, 4096, 4
    groups = SimpleNamespace(world_size=1, rank=0, dp=1, pp=1)

    def __init__(self, folder: Path, says: str = "The answer is 7.\n#### 7</s>"):
        self.spec, self.says = tokenizer.load(folder), says
        self.seeds: list[int] = []
        self.prompts: list[str] = []

    def scores(self, rows: Sequence[Row]) -> dict[int, tuple[float, bool]]:
        self.prompts += [tokenizer.decode(row.tokens, self.spec) for row in rows]
        return {number: (-float(sum(tokens)), False) for row in rows for number, tokens in row.pairs}

    def rollouts(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        self.prompts += [tokenizer.decode(prompt, self.spec) for prompt in prompts]
        self.seeds += seeds
        ids = tuple(tokenizer.encode_text(self.says, self.spec))
        return [Rollout(index, 0, seed, ids_of(ids), logprobs_of((0.0,) * len(ids)), "end_token") for index, seed in enumerate(seeds)]


Run = Callable[..., tuple[list[Any], dict[str, Any]]]


@pytest.fixture
def model(tiny_tokenizer: Path) -> Scripted:
    return Scripted(tiny_tokenizer)


@pytest.fixture
def run(model: Scripted, lm_eval_manager: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(lm_tasks, "manager", lambda: lm_eval_manager)
    return lambda names, path, **choices: harness.run(model, names, {"": path}, **choices)  # type: ignore[arg-type]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sums(first: int, count: int = 12) -> list[dict[str, Any]]:
    numbers = range(first, first + count)
    return [{"question": f"What is {number} and 1?", "answer": f"It is {number + 1}.\n#### {number + 1}"} for number in numbers]


def test_documents_become_results(run: Run, tmp_path: Path) -> None:
    """From a split file and an examples file, joined by an id of place and content; lm-eval's version and the BOS policy stand in the figures."""
    write(tmp_path / "openai/gsm8k/main/test.jsonl", sums(1))
    write(tmp_path / "openai/gsm8k/main/train.jsonl", sums(100))
    results, figures = run(["gsm8k"], tmp_path, limit=8)
    assert [result.id.split("-")[0] for result in results] == list("01234567") and len({result.id for result in results}) == 8
    right = [result for result in results if result.outcome == "right"]
    assert [(result.id.split("-")[0], result.score, result.task) for result in right] == [("5", 1.0, "lm_eval/gsm8k")]
    assert results[0].text == "The answer is 7.\n#### 7" and results[0].ended == "end_token" and results[0].num_tokens > 3
    of_task = figures["tasks"]["gsm8k"]
    assert (of_task["score"], of_task["num_fewshot"], of_task["filter"]) == (1 / 8, 5, "strict-match")
    assert of_task["metrics"]["exact_match,flexible-extract"] == 1 / 8


def test_trap_10_lm_evals_version_is_pinned_and_said(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "openai/gsm8k/main/test.jsonl", sums(1))
    write(tmp_path / "openai/gsm8k/main/train.jsonl", sums(100))
    _, figures = run(["gsm8k"], tmp_path, limit=1)
    assert figures["engine"] == {"log_likelihoods": "forward pass", "generations": "cached"}  # whatever samples the other tasks
    assert figures["version"].startswith("0.4.13") and figures["tasks"]["gsm8k"]["version"] == 3.0


def test_a_missing_file_is_refused_by_name(run: Run, model: Scripted, tmp_path: Path) -> None:
    """With what to download and where to put it, for all tasks at once, before the model is asked."""
    write(tmp_path / "openai/gsm8k/main/test.jsonl", sums(1))
    with pytest.raises(InputError) as refused:
        run(["gsm8k", "leaderboard_musr", "hellaswag", "nonsense"], tmp_path)
    said = [str(problem) for problem in refused.value.problems]
    assert len(said) == 4 and model.prompts == []  # once a dataset: MuSR's three tasks are splits of one
    assert "nonsense" in said[0] and "hf download Rowan/hellaswag" in said[3]
    assert "split train of openai/gsm8k" in said[1] and said[1].endswith(f"--local-dir {tmp_path}/openai/gsm8k")


def test_a_missing_dataset_is_told_once_at_its_key(lm_eval_index: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        lm_tasks.plan(["mmlu"], {}, lm_eval_index, where="tasks.a.lm_eval")
    assert [problem.where for problem in refused.value.problems] == ["tasks.a.lm_eval.files"]
    assert "cais/mmlu (abstract_algebra, anatomy, astronomy, and 54 more)" in str(refused.value)
    assert str(refused.value).endswith("--local-dir DIR/cais/mmlu, and name DIR in tasks.a.lm_eval.files")
    absent = tmp_path / "absent.jsonl"
    with pytest.raises(InputError) as refused:
        lm_tasks.plan(["wikitext"], {"wikitext": absent}, lm_eval_index, hub=True, where="tasks.a.lm_eval")
    assert str(refused.value).startswith(
        f"tasks.a.lm_eval.files.wikitext: found {absent}, which is not there; required a folder of datasets"
    )
    assert "download" not in str(refused.value)


def test_a_record_ends_where_its_format_says(tmp_path: Path) -> None:
    """At a line break alone, and in CSV at one outside of quotes: not at what str.splitlines takes for one."""
    asked = ["1+1?", "one\u2028two", "a\x0cb", "c\x85d", "e\x1df"]
    cells = ["question", *asked, '"two\nlines"']
    (tmp_path / "test.csv").write_text("".join(f"{cell},2\r\n" for cell in cells), "utf-8", newline="")
    lines = [json.dumps({"question": question}, ensure_ascii=False) for question in asked]
    (tmp_path / "test.jsonl").write_text("\n".join(lines), "utf-8")
    assert [row["question"] for row in lm_files.read([tmp_path / "test.csv"])] == [*asked, "two\nlines"]
    assert [row["question"] for row in lm_files.read([tmp_path / "test.jsonl"])] == asked


def test_a_single_file_is_the_evaluated_split(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"text": f"one two {number} three"} for number in range(3)])
    results, _ = run(["lambada_openai"], path)
    assert len(results) == 3 and all(0 < result.score < 1e-3 or result.score in (0, 1) for result in results)
    with pytest.raises(
        InputError, match=r"the file of test of openai/gsm8k \(main\) alone; .*--local-dir DIR/openai/gsm8k, and name DIR in lm_eval.files"
    ):
        run(["gsm8k"], write(tmp_path / "test.jsonl", sums(1)))


def test_trap_3_evaluated_documents_are_no_examples(run: Run, model: Scripted, tmp_path: Path) -> None:
    """lm-eval draws them where a file of examples holds them too; its own exclusion knows only splits."""
    write(tmp_path / "openai/gsm8k/main/test.jsonl", sums(1, 4))
    write(tmp_path / "openai/gsm8k/main/train.jsonl", sums(1, 4) + sums(100, 6))
    _, figures = run(["gsm8k"], tmp_path)
    assert figures["tasks"]["gsm8k"]["num_taken_out"] == 4 and figures["tasks"]["gsm8k"]["num_excluded"] == 0
    assert all(prompt.count(f"What is {number} and 1?") <= 1 for prompt in model.prompts for number in range(1, 5))
    write(tmp_path / "openai/gsm8k/main/train.jsonl", sums(1, 4) + sums(100, 2))
    with pytest.raises(InputError, match="4 of the 6 few-shot examples to draw from are evaluated documents"):
        run(["gsm8k"], tmp_path)


def test_trap_3_a_task_without_a_split_for_examples(run: Run, model: Scripted, tmp_path: Path) -> None:
    """lm-eval would draw them from the evaluated split, the document at hand included: what is not evaluated is left to draw from, or it is refused."""
    path = write(tmp_path / "test.jsonl", [{"text": f"one two {number} three"} for number in range(12)])
    _, figures = run(["lambada_openai"], path, num_fewshot=2, limit=4)
    assert figures["tasks"]["lambada_openai"]["num_taken_out"] == 4 and figures["tasks"]["lambada_openai"]["num_fewshot"] == 2
    assert not any(f"two {number} three" in prompt for prompt in model.prompts for number in range(4))
    with pytest.raises(InputError, match="12 of the 12 few-shot examples to draw from are evaluated documents"):
        run(["lambada_openai"], path, num_fewshot=2)


def test_trap_3_a_document_among_fixed_examples_is_left_out(run: Run, tmp_path: Path) -> None:
    """BBH's examples stand in lm-eval's config: the document that is one of them is not scored, and the others keep the published prompt."""
    known = {"input": "not ( ( not not True ) ) is", "target": "False"}
    records = [known, {"input": "True and True is", "target": "True"}, {"input": "not True is", "target": "False"}]
    write(tmp_path / "SaylorTwift/bbh/boolean_expressions/test.jsonl", records)
    results, figures = run(["leaderboard_bbh_boolean_expressions"], tmp_path)
    assert [result.id.split("-")[0] for result in results] == ["1", "2"]
    assert figures["tasks"]["leaderboard_bbh_boolean_expressions"]["num_excluded"] == 1


def test_trap_2_bracketed_choices_are_counted(run: Run, tmp_path: Path) -> None:
    """lm-eval deletes [4+2] from a choice; the published score rests on it, so it is said and not mended."""
    plain = {"Question": "Which?", "Correct Answer": "a", "Incorrect Answer 1": "b", "Incorrect Answer 2": "c", "Incorrect Answer 3": "d"}
    write(tmp_path / "Idavidrein/gpqa/gpqa_diamond.jsonl", [plain, {**plain, "Correct Answer": "a [4+2] cycloaddition"}])
    results, figures = run(["leaderboard_gpqa_diamond"], tmp_path)
    assert len(results) == 2 and figures["tasks"]["leaderboard_gpqa_diamond"]["num_altered"] == 1


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_choice_without_a_finite_log_likelihood_is_no_answer(value: float, run: Run, model: Scripted, tmp_path: Path) -> None:
    """lm-eval would take the first choice: one of four right for a model of NaN."""
    choices = {"Correct Answer": "a", "Incorrect Answer 1": "b", "Incorrect Answer 2": "c", "Incorrect Answer 3": "d"}
    write(tmp_path / "Idavidrein/gpqa/gpqa_diamond.jsonl", [{"Question": "Which?", **choices}])
    model.scores = lambda rows: {number: (value, False) for row in rows for number, _ in row.pairs}  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"lm_eval continuation .*: found logits that are NaN or inf"):
        run(["leaderboard_gpqa_diamond"], tmp_path)


def test_trap_1_repeats(run: Run, model: Scripted, tmp_path: Path, lm_eval_index: Any) -> None:
    """Each repeat has a seed of its own, and a task of which lm-eval would score the first repeat alone is refused."""
    write(tmp_path / "openai/gsm8k/main/test.jsonl", sums(1, 2))
    write(tmp_path / "openai/gsm8k/main/train.jsonl", sums(100))
    run(["gsm8k_cot_self_consistency"], tmp_path)
    repeats = lm_eval_index["gsm8k_cot_self_consistency"].cfg["repeats"]
    assert repeats > 1 and len(set(model.seeds)) == len(model.seeds) == 2 * repeats
    config = {"repeats": 4, "filter_list": [{"name": "strict", "filter": [{"function": "regex"}, {"function": "take_first"}]}]}
    assert ["scores the first alone" in str(problem) for problem in lm_tasks.refusals("mine", config)] == [True]


def test_trap_4_a_second_bos_is_never_added(run: Run, model: Scripted, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "test.jsonl", [{"text": "<s>one two three"}, {"text": "<s><s>one two four"}, {"text": "one two five"}])
    for bos, begins in (("one", [1, 2, 1]), ("none", [1, 2, 0])):
        model.prompts.clear()
        _, figures = run(["lambada_openai"], tmp_path, bos=bos)
        assert sorted(prompt.count("<s>") for prompt in model.prompts) == sorted(begins)
        assert figures["bos"] == bos and figures["counts"]["num_two_bos"] > 0
    assert "begins with two begin-of-text tokens" in caplog.text


def test_trap_3_examples_under_a_chat_template(run: Run, model: Scripted, tmp_path: Path, tiny_tokenizer: Path) -> None:
    """MMLU-Pro's example: its reasoning is the assistant's turn, not the user's; and the template's BOS is the only one."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in tiny_tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    template = "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}[assistant]"
    (folder / "chat_template.jinja").write_text(template)
    model.spec = tokenizer.load(folder)
    one = {
        "question": "What?",
        "options": ["a", "b"],
        "answer": "A",
        "answer_index": 0,
        "category": "biology",
        "cot_content": "A: Let's think step by step. Both.",
    }
    write(tmp_path / "TIGER-Lab/MMLU-Pro/data/test.jsonl", [{**one, "question": "Which?"}])
    write(tmp_path / "TIGER-Lab/MMLU-Pro/data/validation.jsonl", [{**one, "question": f"What {number}?"} for number in range(5)])
    _, figures = run(["mmlu_pro_biology"], tmp_path, chat=True, bos="one")
    (prompt,) = model.prompts
    assert figures["chat"] and prompt.count("<s>") == 1 and prompt.endswith("[assistant]")
    turns = prompt.split("[")
    assert sum("Both." in turn and turn.startswith("assistant]") for turn in turns) == 5
    assert not any("Both." in turn and turn.startswith("user]") for turn in turns)


@pytest.mark.parametrize(
    ("task", "metric"),
    [("mrpc", "acc"), ("lambada_openai", "acc"), ("wikitext", "bits_per_byte"), ("cruxeval_input", "pass_at_k"), ("cola", None)],
)
def test_a_task_is_scored_by_what_each_document_has(lm_eval_manager: Any, task: str, metric: str | None) -> None:
    """mcc, or f1 of labels, is a figure of all documents, from pairs of labels: as a share of one it would be a number without meaning."""
    config = lm_eval_manager.task_index[task].cfg
    assert lm_tasks.metric_of(config) == metric
    refused = ["mcc, which judge all documents together" in str(problem) for problem in lm_tasks.refusals(task, config)]
    assert any(refused) is (metric is None)


@pytest.mark.parametrize("value", [(0, 0), (1, 1), ("gold", "said"), [0, 1], 1.5, -0.1, math.nan])
def test_what_is_no_share_is_no_score(value: Any) -> None:
    with pytest.raises(InputError, match=r"lm_eval task mine: found f1 .* of a document; required a share"):
        harness._score("mine", "f1", value, "multiple_choice")
    assert harness._score("mine", "acc", [True, False], "generate_until") == 0.5
    assert harness._score("mine", "bits_per_byte", (-2.0, 2), "loglikelihood_rolling") == pytest.approx(math.exp(-1))


def test_code_and_python_tasks_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="runs a model's code here"):
        run(["humaneval"], tmp_path)
    with pytest.raises(InputError, match="a task in Python"):
        run(["squadv2"], tmp_path)
