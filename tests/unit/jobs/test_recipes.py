"""Every recipe, on every size it is laid out for: it loads, holds, builds as every distinct rank, fits; and the documents say so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.check.evaluate import check_evaluate
from megatron_prism.core.check.gang import check_model_on_gang
from megatron_prism.core.check.train import check_extension
from megatron_prism.core.config import EvaluateConfig, ModelConfig, RLConfig, RunConfig, TrainConfig
from megatron_prism.core.layers import merge, read_layers
from megatron_prism.core.load import load
from megatron_prism.core.scalars import LAYOUTS
from megatron_prism.planning.gpus import H100

ROOT = Path(__file__).resolve().parents[3]
EVERY_RECIPE = {f"{path.parent.name}/{path.stem}": path for path in sorted((ROOT / "configs" / "recipes").glob("*/*.yaml"))}
EVALUATIONS = {name: path for name, path in EVERY_RECIPE.items() if name.endswith("/eval")}
RECIPES = {name: path for name, path in EVERY_RECIPE.items() if name not in EVALUATIONS}
TRAINED = [name for name in RECIPES if not name.endswith("/rl")]
SIZES = {name: sorted(merge(read_layers(path, ()))[LAYOUTS]) for name, path in RECIPES.items()}
EVERY = [(name, size) for name, sizes in SIZES.items() for size in sizes]
LEFT_FREE = 0.15  # of the memory, by our rule for layouts
KINDS = {"midtrain", "midtrain_fp8", "longctx", "longctx_attention", "rl", "eval"}
MIDTRAIN_TOKENS, LONGCTX_TOKENS = 26_214_400_000, 4_718_592_000  # the paper's: 25,000 x 128 x 8,192; 1,000 x 36 x 131,072
NOTHING_FITS_ON_8 = {
    f"{model}/{kind}"
    for model in ("granite-4.0-h-micro", "mistral-small-24b", "nemotron-h-8b")
    for kind in ("longctx", "longctx_attention")
} | {"mistral-small-24b/longctx_yarn"}
EXTENDED = {"mistral-7b-v0.1": {"longctx_yarn"}, "mistral-small-24b": {"longctx_yarn"}}  # whose rotary positions end before 128k


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what planner_worker.py writes, from a process of its own: the host's stand-in for CUDA stays there."""
    file = tmp_path_factory.mktemp("plans") / "found.json"
    command = [sys.executable, str(Path(__file__).with_name("planner_worker.py")), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def plans(found: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(entry["recipe"], entry["world_size"]): entry["plan"] for entry in found["plans"]}


def test_each_of_the_papers_models_has_its_recipes(presets: dict[str, ModelConfig]) -> None:
    kinds: dict[str, set[str]] = {}
    for name in EVERY_RECIPE:
        model, _, kind = name.partition("/")
        kinds.setdefault(model, set()).add(kind)
    assert kinds.keys() == presets.keys() - {"qwen2.5-7b"}  # not one of the paper's
    assert all(found == KINDS | EXTENDED.get(model, set()) for model, found in kinds.items())
    fewer = {name: sizes for name, sizes in SIZES.items() if sizes != [8, 64, 128]}
    assert fewer == {name: [64, 128] for name in NOTHING_FITS_ON_8}


@pytest.mark.parametrize(("name", "size"), EVERY)
def test_a_recipe_fits_and_leaves_room(
    plans: dict[tuple[str, int], dict[str, Any]], preset_parameters: dict[str, int], name: str, size: int
) -> None:
    plan, model = plans[name, size], name.partition("/")[0]
    assert plan["fits"] and plan["memory_gib_per_gpu_max"] <= (1 - LEFT_FREE) * H100.memory_gib
    assert plan["world_size"] == size and plan["parameters"] == preset_parameters[model]
    grid = plan["layout"]
    held = sum(stage["parameters"] for stage in plan["stages"]) * grid["tp"]
    twice = 1.07 if grid["pp"] > 1 else 1.01  # norms are on every tp rank, the vocabulary is padded, tied embeddings are on two stages
    assert plan["parameters"] <= held < twice * plan["parameters"]
    assert grid["tp"] * grid["pp"] * grid["cp"] * grid["dp"] == size
    assert (plan["trainable_parameters"] == plan["parameters"]) == (not name.endswith("_attention"))
    if name in TRAINED:
        assert plan["tokens"] == (MIDTRAIN_TOKENS if "midtrain" in name else LONGCTX_TOKENS)
    else:
        assert plan["responses"] == 1_024_000 and grid["dp"] <= 64  # else replicas without a prompt would wait
        stages = plan["stages"]
        assert all(stage["reference_gib"] == stage["weights_gib"] > 0 and stage["cache_gib"] > 0 for stage in stages)


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_says_what_the_paper_says_and_runs_on_its_own_size(name: str) -> None:
    config = load(RECIPES[name], TrainConfig)
    optimizer, schedule = config.optimizer, config.schedule
    assert config.world_size == 64
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay) == (5e-5, 0.9, 0.95, 1e-10, 0.1)
    if "midtrain" in name:
        assert (schedule.kind, schedule.warmup_steps, schedule.final_factor, config.steps) == ("cosine", 500, 0.1, 25_000)
        assert (config.batch.global_size, config.batch.micro_size, config.data.seq_length) == (128, 1, 8192)
    else:
        assert (schedule.kind, schedule.warmup_steps, schedule.final_factor, config.steps) == ("exponential", 100, 0.0, 1000)
        assert config.validation.interval == 0 and config.logits_chunk_tokens == 8192  # else the logits are the largest tensor
        assert config.model is not None and not list(check_extension(config.init, config.model))
        longer = config.init.extend(config.model)
        assert longer.max_position_embeddings == config.data.seq_length == 131072
        is_paper = (longer.rotary_base, longer.yarn, longer.window_size) == (config.model.rotary_base, None, config.model.window_size)
        assert is_paper == (not name.endswith("_yarn"))
    assert (config.fp8 is not None) == name.endswith("_fp8") and config.precision == "bf16"
    assert config.trainable == (("*.self_attention.*",) if name.endswith("_attention") else ("*",))


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - set(TRAINED)))
def test_an_rl_recipe_says_what_the_paper_says(name: str) -> None:
    config = load(RECIPES[name], RLConfig)
    rollout, algorithm, schedule = config.rollout, config.algorithm, config.schedule
    assert (config.world_size, config.steps, config.precision, config.fp8) == (64, 1000, "bf16", None)
    assert (rollout.num_prompts, rollout.num_samples, rollout.temperature, config.batch.seq_length) == (64, 16, 1.0, 16_384)
    assert (config.optimizer.lr, schedule.kind, schedule.warmup_steps, schedule.final_factor) == (5e-7, "linear", 0, 0.0)
    assert (algorithm.advantage, algorithm.loss, algorithm.kl_beta, algorithm.tis_cap) == ("grpo", "clip", 0.05, 2.0)
    assert config.reference.interval == 1 and config.reference.alpha < 1  # soft updates
    assert config.init.checkpoint == Path("runs") / name.partition("/")[0] / "midtrain" and config.save.interval == 20


def test_no_two_recipes_write_to_one_folder() -> None:
    kinds: dict[str, type[RunConfig]] = {name: TrainConfig if name in TRAINED else RLConfig for name in RECIPES}
    folders = [str(load(path, kinds[name]).run_dir) for name, path in RECIPES.items()]
    assert len(set(folders)) == len(folders) and sorted(folders) == sorted(f"runs/{name}" for name in RECIPES)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_recipe_asks_what_the_paper_asks(found: dict[str, Any], presets: dict[str, ModelConfig], name: str) -> None:
    config, model = load(EVALUATIONS[name], EvaluateConfig), presets[name.partition("/")[0]]
    assert config.world_size == 8 and config.out == Path("runs") / name
    assert [*check_evaluate(config, 8), *check_model_on_gang(model, config)] == []
    assert config.model.checkpoint == Path("runs") / name.partition("/")[0] / "midtrain"
    six = ["aime24", "aime25", "math500", "livecodebench", "codeforces", "gpqa_diamond"]
    assert list(config.tasks) == [*six, "leaderboard_v1", "leaderboard_v2", "ruler"]
    changed = ("num_samples", "temperature", "top_p", "max_tokens", "limit", "think", "answer")
    assert all(getattr(task, key) is None for task in config.tasks.values() for key in changed)  # each set's own protocol
    ruler = config.tasks["ruler"].ruler
    assert ruler is not None and ruler.lengths[0] == 8192 and ruler.lengths[-1] == min(131_072, model.max_position_embeddings)
    (entry,) = [entry for entry in found["evaluations"] if entry["recipe"] == name]
    planned = entry["plan"]
    assert 0 < planned["memory_gib_per_gpu_max"] <= (1 - LEFT_FREE) * H100.memory_gib
    assert planned["parts"]["math500"]["responses"] == 32_000 and planned["not_planned"] == ["leaderboard_v1", "leaderboard_v2"]
    assert 0 < planned["hours"] <= planned["hours_longest"] and planned["gpu_hours"] == pytest.approx(8 * planned["hours"])
    assert all(rows >= 16 for rows in entry["num_rows"].values())


@pytest.mark.parametrize("document", ["RECIPES.md", "PLANNER.md"])
def test_the_documents_tables_are_of_today(found: dict[str, Any], document: str) -> None:
    text = (ROOT / "docs" / document).read_text()
    assert f"\n{found['tables'][document]}\n<!-- end -->" in text, f"docs/{document}: run its tool (named in its mark) again"


def test_flops_are_the_published_ones(found: dict[str, Any]) -> None:
    errors = [row["flops_error"] for row in found["published"] if row["flops_error"] is not None]
    assert len(errors) == 12 and max(map(abs, errors)) < 0.01


def test_the_rates_of_rows_that_nothing_was_fitted_to(found: dict[str, Any]) -> None:
    held = [row for row in found["published"] if "fit" not in row["facts"]]
    assert len(held) == 15 and max(abs(row["rate_error"]) for row in held) < 0.1
    fitted = [row for row in found["published"] if "fit" in row["facts"]]
    assert len(fitted) == 3 and max(abs(row["rate_error"]) for row in fitted) < 0.01


def test_layouts_that_have_run_fit(found: dict[str, Any]) -> None:
    """Those without FSDP, if their gradients were in bf16, as NVIDIA's recipes allow: the one thing known of memory on a GPU."""
    for row in found["published"]:
        if row["facts"]["source"] != "bridge" or row["facts"]["model"] != "llama3-8b":
            halved = [total - gradients / 2 for total, gradients in zip(row["memory_gib"], row["gradients_gib"], strict=True)]
            assert max(halved) < H100.memory_gib, row["facts"]
