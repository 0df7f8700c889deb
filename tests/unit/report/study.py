"""A study on the disk as its stages leave it, tiny, with names that would break a page which trusted them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>'
LINK = "[x](javascript:alert(1)) | `a` https://example.com/x.js"
SHARES = {"0.001": 0.9, "0.01": 0.5, "0.1": 0.1}


def task(score: float, name: str = "file", **more: Any) -> dict[str, Any]:
    protocol = {"num_samples": 4, "temperature": 1.0, "style": "plain text"}
    one = {
        "score": score,
        "standard_error": 0.02,
        "num_questions": 150,
        "num_samples": 4,
        "by": {},
        "protocol": protocol,
        "set": {"name": name},
    }
    return one | more


def summary(score: float, sha256: str) -> dict[str, Any]:
    by = {"length": {"128": score, "512": score / 2}}
    losses = {"math": {"loss": 2.0 - score, "num_tokens": 900, "num_sequences": 8, "standard_error": 0.1}}
    held_out = {"score": None, "losses": losses, "protocol": {}, "set": {"name": "held_out"}}
    tasks = {"math": task(score), HOSTILE: task(score / 2), "retrieval": task(score, by=by), "kept": held_out}
    return {"kind": "evaluation", "model": {"sha256": sha256}, "tasks": tasks, "averages": {"avg": None}, "results_sha256": ""}


def verdict() -> dict[str, Any]:
    change = {"change": 0.2, "low": 0.1, "high": 0.3}
    rule = {"measure": "math", "least_change": 0.1, "decision": "GO", "why": LINK, "num_pairs": 150, **change}
    of_task = {"old_score": 0.2, "new_score": 0.4, "num_pairs": 150, "num_lost": 3, "num_gained": 40, "p_no_change": 1e-9, **change}
    return {"kind": "verdict", "decision": "GO", "rules": [rule], "tasks": {"math": of_task}, "not_paired": {}}


def weights(share: float) -> dict[str, Any]:
    changed = {at: share * value for at, value in SHARES.items()}
    nulls = {key: dict(SHARES) for key in ("changed_dense_null", "changed_dense_null_stored", "changed_shuffled_null")}
    of = {
        "parameters": 100,
        "delta": 0.3,
        "delta_mean_of_tensors": 0.2,
        "changed": changed,
        **nulls,
        "cosine": 0.5,
        "cosine_null_std": 0.01,
    }
    parts = {"total": of, "kinds": {"attention": of, "norm": of}, "components": {"q": of, "norm": of}, "tensors": {}}
    return {"kind": "analysis", "analysis": "weights", "base": "runs/base", "other": f"runs/{HOSTILE}", **parts}


def spectra() -> dict[str, Any]:
    keys = (
        "stable_rank",
        "effective_rank",
        "share_in_leading",
        "share_on_principal",
        "principal_angle_left_max",
        "singular_value_shift_mean",
    )
    of = {f"{prefix}{key}": value for key in keys for prefix, value in (("", 2.0), ("null_", 3.0))}
    return {
        "kind": "analysis",
        "analysis": "spectra",
        "base": "a",
        "other": "b",
        "components": {"q": of, "down": of | {"effective_rank": None}},
    }


def cka() -> dict[str, Any]:
    drawn = {"mean": 0.9, "std": 0.01, "min": 0.8, "max": 0.95}
    forms = ("biased", "debiased")
    layer = {"biased": 0.99, "debiased": 0.5} | {f"{what}_{form}": drawn for what in ("permutation_null", "subsampled") for form in forms}
    of: dict[str, Any] = {
        "gaussian_null": {"biased": 0.95, "debiased": 0.0},
        "layers": [{"layer": number, **layer, "ablated": {}} for number in range(3)],
    }
    for form in forms:
        of |= {f"min_{form}": 0.9, f"min_{form}_layer": 1, f"min_{form}_subsampled": drawn, f"min_{form}_permutation_null": drawn}
        of |= {f"min_{form}_ablated": {"1": 0.8, "5": 0.7}}
    inputs = {"math": {"num_prompts": 40, "num_available": 60, "mean_tokens": 9.0}}
    return {"kind": "analysis", "analysis": "cka", "models": {}, "distributions": inputs, "pairs": {"base|mid": {"math": of}}}


def landscape() -> dict[str, Any]:
    places = [("base", "path", 0.0, 0.0), ("mid", "path", 1.0, 0.0), ("rl", "path", 1.0, 1.0), ("null_0", "null", 1.0, 0.0)]
    places += [(f"plane_{row}_{column}", "plane", 1.0 - row, float(column)) for row in range(2) for column in range(2)]
    of_task = {"score": 0.5, "standard_error": 0.02, "num_questions": 150}
    points: list[dict[str, Any]] = [
        {"name": name, "kind": kind, "a": a, "b": b, "tasks": {"math": of_task}, "loss": 1.5} for name, kind, a, b in places
    ]
    points.append(
        {"name": "keep_0.1", "kind": "keep_largest", "a": 1.0, "b": 1.0, "keep_largest": 0.1, "tasks": {"math": of_task}, "loss": None}
    )
    said = {"ambiguities": {"path": LINK}, "monotonic": {"math": False}, "largest_drop": {"math": {"drop": 0.1, "standard_error": 0.05}}}
    gains = {"keep_0.1": {"math": 0.8}, "null_0": {"math": None}}
    return {
        "kind": "analysis",
        "analysis": "landscape",
        "points": points,
        **said,
        "barrier": {"base_to_mid": 0.1, "mid_to_rl": None},
        "gain_kept": gains,
    }


def trajectory() -> dict[str, Any]:
    change = {"total": weights(0.5)["total"], "kinds": {}, "components": {}}
    both = {"from_base": change, "from_previous": change}
    checkpoints = {step: {**both, "masters": {**both, "rounding": {"delta": 1e-4}}} for step in ("5", "10")}
    return {"kind": "analysis", "analysis": "trajectory", "checkpoints": checkpoints}


def responses() -> dict[str, Any]:
    mean = {"value": 0.5, "standard_error": 0.1, "num": 30}
    nothing = {"value": None, "standard_error": None, "num": 0}
    certainty = {key: mean for key in ("all", "right", "wrong")} | {"wrong_less_right_same_problem": nothing}
    solved = {"num_samples": 2, "num_problems": 30, "none": 0.2, "some": 0.3, "all": 0.5, "null": {"0": 0.25, "1": 0.5, "2": 0.25}}
    shares = {key: 0.5 for key in ("share_cut", "share_with_format", "share_with_steps")}
    of_task = {
        "num_responses": 60,
        "pass_rate": mean,
        "tokens": {"all": {"median": 9.0}},
        "neg_logprob": certainty,
        "solvability": solved,
        **shares,
    }
    flip = {"share": 0.2, "chance": 0.1, "beyond_chance": 0.1, "standard_error": 0.05}
    edge = {name: {"share": 0.5, "gain": mean, "gain_naive": 0.4, "share_of_gain": 0.6} for name in ("none", "some")}
    change = {"num_problems": 30, "gained": 0.3, "lost": 0.1, "gained_by_half": flip, "lost_by_half": flip, "edge": edge}
    models = {name: {"tasks": {HOSTILE: of_task | {"pass_at": {"1": 0.5, "2": 0.7}}}} for name in ("base", "mid")}
    flips = {"base->mid": {HOSTILE: change, "other": {"not_compared": ["another prompt"]}}}
    return {"kind": "analysis", "analysis": "responses", "models": models, "flips": flips}


def write(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values, indent=2), encoding="utf-8")
    return path


def write_run(folder: Path, steps: int = 20, is_rl: bool = False) -> Path:
    plan = {"world_size": 2, "parameters": 1000} | ({"responses_per_step": 8} if is_rl else {"tokens_per_step": 512})
    write(folder / "manifest.json", {"kind": "run", "starts": [{"created": "2026-01-01T00:00:00Z", "plan": plan}]})
    write(folder / "config.yaml", f"steps: {steps}\n")
    own = {"reward": 0.1, "response_tokens": 9.0, "kl": 0.01, "trained_tokens": 70} if is_rl else {}
    lines: list[dict[str, Any]] = [{"step": 0, "valid_loss/math": 3.0}]
    lines += [
        {"step": step, "loss": 3.0 - step / 10, "lr": 1e-3, "grad_norm": None, "step_s": 0.5, "tokens_per_s": 1024.0, **own}
        for step in (10, 20)
    ]
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "lo')
    return folder


def write_evaluation(folder: Path, score: float) -> Path:
    write(folder / "manifest.json", {"kind": "evaluation", "created": "2026-01-01T00:00:00Z", "model": {"sha256": folder.name}})
    write(folder / "summary.json", summary(score, folder.name))
    return folder


def write_mixture(folder: Path) -> Path:
    parts = [
        {"name": HOSTILE, "weight": 3.0, "tokens": 300, "share": 0.75, "epochs": 1.5},
        {"name": "math", "weight": 1.0, "tokens": 100, "share": 0.25, "epochs": 0.1},
    ]
    sources = [{"name": part["name"], "domain": None} for part in parts]
    write(folder / "manifest.json", {"kind": "prepared", "blend": {"tokens": 400, "sources": parts}, "config": {"sources": sources}})
    return folder


def write_study(root: Path, seed: int = 0) -> Path:
    """Write a study with every kind of result."""
    stages: dict[str, Any] = {}

    def stage(name: str, job: str, output: Path | None = None, result: Any = None, **more: Any) -> None:
        if result is not None:
            write(root / "study" / name / "result.json", result)
        one = {"title": f"Do {name}", "model": None, "job": job, "after": list(stages)[-1:], "state": "done", "reason": "", "failure": None}
        place = None if output is None else f"elsewhere/{output.relative_to(root)}"
        stages[name] = one | {"output": place, "seconds": 2.0 + seed, "cpu_s": 3.0, "num_starts": 1} | more

    stage("data", "prepare", write_mixture(root / "data"))
    stage("mid", "train", write_run(root / "mid"), model="mid")
    stage("rl", "rl", write_run(root / "rl", steps=40, is_rl=True), model="mid -> RL", state="failed", failure=HOSTILE)
    for number, model in enumerate(("base", "mid")):
        folder = write_evaluation(root / f"eval_{model}", 0.4 + 0.3 * number + seed / 50)
        stage(f"evaluate_{model}", "evaluate", folder, model=model)
    stage("gate", "evaluate compare", write(root / "gate" / "verdict.json", verdict()).parent, verdict())
    row = {"source": "data", "benchmark": HOSTILE, "side": "question", "num_hit": 1, "num_whole": 0, "num_searched": 9}
    row |= {"num_documents_hit": 1, "containment": 0.1, "max_containment": 0.5}
    stage("scan", "contaminate", None, {"kind": "contamination", "ngram": 13, "table": [row]})
    analyses = {
        "weights": weights(0.9 + seed / 100),
        "spectra": spectra(),
        "cka": cka(),
        "landscape": landscape(),
        "responses": responses(),
    }
    for name, result in (analyses | {"trajectory": trajectory()}).items():
        stage(name, f"analyze {name}", None, result)
    figure = "evaluate_mid:tasks.math.score"
    check = {"part": "shows", "value": figure, "relation": "above", "than": 0.2, "by": 0.05, "holds": True}
    claim = {
        "name": "math-rises",
        "says": LINK,
        "source": "Table 5",
        "judged_at": "T 1",
        "note": HOSTILE,
        "state": "holds" if seed < 2 else "fails",
    }
    claims = [claim | {"figures": {figure: 0.7 + seed / 50}, "checks": [check]}]
    write(root / "study" / "study.json", {"kind": "study", "name": "tiny", "run_dir": "elsewhere", "stages": stages, "claims": claims})
    return root
