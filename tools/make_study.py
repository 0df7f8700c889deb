"""Write configs/studies/prism.yaml: the paper at full size as a study, from the tables below, a stage a line. A stage NAME writes ${run_dir}/NAME.

python tools/make_study.py            # write it
python tools/make_study.py --check    # exit code 1 where the file is not what it would write (tests/unit/study/test_prism_yaml.py)
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = Path("configs/studies/prism.yaml")
PLAIN = re.compile(r"[A-Za-z_-][A-Za-z0-9_./=-]*")
IN_RUN = re.compile(r"\$\{run_dir\}/([a-z0-9_]+)")
MIXTURES = {"m": "math", "mc": "math_code", "mcs": "math_code_science"}
SETS = ("deepscaler", "skywork_or1_math", "intellect_2_math", "deepcoder", "skywork_or1_code", "opencodeinstruct", "nemotron_pt_v1_stem")
MIXES = ("mc_unbalanced", "mcs_unbalanced", "mc_balanced", "mcs_balanced")
BENCHMARKS = ("aime24", "aime25", "math500", "gpqa_diamond", "livecodebench", "codeforces")
CURVE = range(100, 1001, 100)  # the checkpoints that rl.yaml keeps


@dataclass(frozen=True)
class Model:
    """A model of the paper: its title, recipes, Hugging Face folder; its mixtures, and its RL as (start, mix); how analyses lay it out."""

    title: str
    recipes: str
    hf: str
    mids: tuple[str, ...] = ("mcs",)
    rls: tuple[tuple[str, str], ...] = ()
    analyzed: tuple[str, ...] = ()


PIPELINE = tuple((start, mix) for start in ("mc", "mcs") for mix in ("mc_unbalanced", "mcs_unbalanced"))  # Table 11
TP8 = ("parallel.tp=8", "parallel.sequence_parallel=true", "num_rows=128")
MODELS = {
    "granite33": Model(
        "Granite-3.3 8B",
        "granite-3.3-8b",
        "granite-3.3-8b-base",
        ("m", "mc", "mcs"),
        (*PIPELINE, ("base", "mcs_unbalanced")),
        (*TP8, "cache_tokens=2900000"),
    ),
    "llama31": Model("LLaMA-3.1 8B", "llama-3.1-8b", "Llama-3.1-8B", ("mc", "mcs"), PIPELINE, (*TP8, "cache_tokens=3600000")),
    "mistral7b": Model("Mistral-7B", "mistral-7b-v0.1", "Mistral-7B-v0.1", ("mc", "mcs"), PIPELINE),
    "nemotronh": Model(
        "Nemotron-H 8B",
        "nemotron-h-8b",
        "Nemotron-H-8B-Base-8K",
        ("mc", "mcs"),
        (("mcs", "mcs_unbalanced"), ("base", "mcs_unbalanced")),
        ("parallel.tp=4", "parallel.sequence_parallel=true", "num_rows=256", "cache_tokens=12000000"),
    ),
    "mistral24b": Model(
        "Mistral-Small 24B",
        "mistral-small-24b",
        "Mistral-Small-24B-Base-2501",
        rls=(("mcs", "mcs_unbalanced"), ("mcs", "mcs_balanced")),
    ),
    "granite4micro": Model(
        "Granite-4.0 Micro", "granite-4.0-micro", "granite-4.0-micro-base", rls=(("mcs", "mcs_unbalanced"), ("mcs", "mcs_balanced"))
    ),
    "granite4hmicro": Model("Granite-4.0-H Micro", "granite-4.0-h-micro", "granite-4.0-h-micro-base", rls=(("mcs", "mcs_balanced"),)),
}
HEAD = """\
# The paper (PRISM, arXiv 2603.17074) at full size, planned for H100s: every table that is a result of ours to make, but one (docs/REPRODUCE.md).
# Written by tools/make_study.py: change its tables, or copy this file. A stage NAME writes ${run_dir}/NAME; prompts lie in data/, as their configs say.
#   prism study configs/studies/prism.yaml --dry-run     # GPUs, hours, storage, cost, the order; needs no weights, no data, no GPU
# Before it runs: the seven base models in ${variables.hf}, the sources of configs/sources and configs/prompts in data/sources, the evaluation
# sets in data/evaluation, the leaderboards' data where v1 and v2 say (or v1=tasks.leaderboard_v1.lm_eval.hub=true, and v2).
# Not here: Table 3, for the checkpoints of Granite-4's pretraining that it starts from are not public.
# Nothing of this was run. What the paper leaves open is ours, and says so here or in the recipe.
base: prism_claims.yaml
name: prism
run_dir: runs/prism
variables:
  hf: hf
  v1: 'tasks.leaderboard_v1.lm_eval.files={"": data/evaluation/leaderboards}'
  v2: 'tasks.leaderboard_v2.lm_eval.files={"": data/evaluation/leaderboards}'
  mid_gpus: "64"
  long_gpus: "64"
  rl_gpus: "64"  # 8 take less than half of the GPU-hours, and 1.6 to 3.5 times the days (docs/RECIPES.md); of Mistral-Small more of both
num_parallel: 1  # on a machine of your own
"""


@dataclass
class Writer:
    """The file's lines. A stage waits for those whose folder its words name, and for `after`."""

    lines: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    needed: set[str] = field(default_factory=set)

    def say(self, comment: str) -> None:
        self.lines += ["", *(f"  # {line}" for line in comment.splitlines())]

    def stage(
        self, name: str, *command: str, model: str = "", after: Sequence[str] = (), array: Sequence[Sequence[str]] = (), gate: bool = False
    ) -> None:
        words = [word for part in (command, *array) for word in part]
        named = [other for word in words for other in IN_RUN.findall(word) if other in self.names and other != name]
        before = list(dict.fromkeys([*after, *named]))
        parts = [f"name: {name}", *([f"model: {json.dumps(model)}"] if model else []), *([f"after: {_list(before)}"] if before else [])]
        parts += [f"command: {_list(command)}", *([f"array: [{', '.join(map(_list, array))}]"] if array else [])]
        self.lines.append(f"  - {{{', '.join([*parts, *(['on_failure: report'] if gate else [])])}}}")
        self.names.append(name)
        self.needed |= set(before)


def _list(words: Sequence[str]) -> str:
    return f"[{', '.join(word if PLAIN.fullmatch(word) else json.dumps(word) for word in words)}]"


def _run(name: str) -> str:
    return f"${{run_dir}}/{name}"


def _recipe(key: str, kind: str) -> str:
    return f"configs/recipes/{MODELS[key].recipes}/{kind}.yaml"


def text() -> str:
    """Return the file."""
    out = Writer()
    out.say("The prompts of RL (Table 10, Appendix 15): the same for every model, filtered by Granite-3.3's mid-trained model")
    out.stage("prompts", "prompts", array=[[f"configs/prompts/{name}.yaml"] for name in SETS])
    for key in MODELS:
        _model(out, key)
        if key == "granite33":
            _prompts(out)
            _long_context(out, key)
    _context_lengths(out, "granite4micro")
    _budgets(out, "granite4micro")
    for key, model in MODELS.items():
        _reinforce(out, key)
        if model.analyzed:
            _analyze(out, key)
    _contamination(out)
    _report(out)
    return f"{HEAD}stages:{chr(10).join(['', *out.lines[1:]])}\n"


def _model(out: Writer, key: str) -> None:
    """The mixtures, the base and the mid-trained models of one model, with the scores of each."""
    model = MODELS[key]
    out.say(f"{model.title}: mid-training (Tables {'4, 5, 6, 19' if key == 'granite33' else '6'})")
    out.stage(f"{key}_base", "convert", "import", "--hf", f"${{variables.hf}}/{model.hf}", "--out", _run(f"{key}_base"))
    _score(out, key, f"{key}_base", "base")
    for mixture in model.mids:
        _prepare(out, key, mixture)
    for mixture in model.mids:
        _train(out, key, f"{key}_mid_{mixture}", mixture, mixture.upper())
    if key == "granite33":
        out.say("The same mixture in another order: the most that two updates can be alike, beside MC and MCS (ours)")
        _mid(out, key, f"{key}_mid_mcs_again", "mcs", "MCS again", "seed=1235")


def _prepare(out: Writer, key: str, mixture: str, *words: str) -> None:
    name = f"{key}_data_{mixture}"
    config = "configs/mixtures/longctx.yaml" if mixture == "long" else f"configs/mixtures/{MIXTURES[mixture]}.yaml"
    out.stage(name, "prepare", config, f"tokenizer=${{variables.hf}}/{MODELS[key].hf}", f"out={_run(name)}", *words)


def _mid(out: Writer, key: str, name: str, mixture: str, title: str, *words: str) -> None:
    places = (f"run_dir={_run(name)}", f"init.checkpoint={_run(f'{key}_base')}", f"data.prepared={_run(f'{key}_data_{mixture}')}")
    gpus = "world_size=${variables.mid_gpus}"
    out.stage(name, "train", _recipe(key, "midtrain"), *places, gpus, *words, model=f"{MODELS[key].title}: {title}")


def _train(out: Writer, key: str, name: str, mixture: str, title: str, *words: str) -> None:
    _mid(out, key, name, mixture, title, *words)
    _measure(out, key, name, title)


def _measure(out: Writer, key: str, name: str, title: str) -> None:
    """Export a run, score it, and hold it against the base model."""
    out.stage(f"{name}_hf", "convert", "export", "--ckpt", _run(name), "--out", _run(f"{name}_hf"))
    _score(out, key, name, title)


def _score(out: Writer, key: str, name: str, title: str) -> None:
    scores, model = f"{name}_scores", f"{MODELS[key].title}: {title}"
    words = (f"model.checkpoint={_run(name)}", f"out={_run(scores)}", "${variables.v1}", "${variables.v2}")
    out.stage(scores, "evaluate", _recipe(key, "eval"), *words, model=model)
    if title != "base":
        against = ("--against", _run(f"{key}_base_scores"), "--policy", "configs/policies/retention.yaml")
        out.stage(f"{name}_gate", "evaluate", "compare", _run(scores), *against, "--out", _run(f"{name}_gate"), model=model, gate=True)


def _prompts(out: Writer) -> None:
    out.say(
        "The filter: 16 responses to each prompt; then the mixes. The paper does not say which mixture its filter was mid-trained on: MCS is ours"
    )
    sets = [[f"prompts=data/prompts/{name}", f"out=data/passes/{name}"] for name in SETS]
    out.stage(
        "filter", "rl", "filter", "configs/base/filter.yaml", f"init.checkpoint={_run('granite33_mid_mcs')}", after=["prompts"], array=sets
    )
    out.stage("mixes", "rl", "mix", after=["filter"], array=[[f"configs/prompts/mixes/{name}.yaml"] for name in MIXES])


def _long_context(out: Writer, key: str) -> None:
    out.say("Merge and long context on its MC model (Tables 7, 17, 18), and each without the merge")
    _prepare(out, key, "long")
    merge, start = f"{key}_merge", f"{key}_merged"
    parts = ("--model", f"{_run(f'{key}_base')}=0.15", "--model", f"{_run(f'{key}_mid_mc')}=0.85")
    out.stage(merge, "merge", *parts, "--out", _run(merge), model=f"{MODELS[key].title}: merge")
    out.stage(start, "convert", "import", "--hf", _run(merge), "--out", _run(start))
    _score(out, key, start, "merge")
    for origin, place in (("merge", start), ("mc", f"{key}_mid_mc")):
        for kind, recipe in (("full", "longctx"), ("attention", "longctx_attention")):
            name, title = f"{key}_{origin}_long_{kind}", f"{'merge' if origin == 'merge' else 'MC'} -> long, {kind}"
            places = (f"run_dir={_run(name)}", f"init.checkpoint={_run(place)}", f"data.prepared={_run(f'{key}_data_long')}")
            gpus = "world_size=${variables.long_gpus}"
            out.stage(name, "train", _recipe(key, recipe), *places, gpus, model=f"{MODELS[key].title}: {title}")
            _measure(out, key, name, title)


def _context_lengths(out: Writer, key: str) -> None:
    out.say("Its context (Table 8; 8k is above). As many tokens a step at each length is ours")
    for kilo, size in ((16, 64), (32, 32)):
        words = (f"data.seq_length={kilo * 1024}", f"batch.global_size={size}", f"parallel.cp={kilo // 8}")
        _train(out, key, f"{key}_mid_mcs_{kilo}k", "mcs", f"MCS, {kilo}k", *words)


def _budgets(out: Writer, key: str) -> None:
    out.say(
        "Its token budgets (Tables 9, 20). A run each, whose learning rate has decayed, is ours: the paper does not say. Checkpoints of one run would do where it\n"
        "has one: the longest keeps those of 10,000, 15,000 and 25,000 steps (model.checkpoint=.../checkpoints/step_00010000), at a higher learning rate"
    )
    _prepare(out, key, "mc", "tokens=31457280000")
    for steps in (10_000, 15_000, 25_000, 30_000):
        name = f"{key}_mid_mc_{steps // 1000}k_steps"
        _train(out, key, name, "mc", f"MC, {steps:,} steps", f"steps={steps}")


def _reinforce(out: Writer, key: str) -> None:
    model = MODELS[key]
    tables = (
        "Table 11, 12, figures"
        if key == "granite33"
        else "Table 11"
        if model.rls == PIPELINE
        else "Figure 17"
        if key == "granite4micro"
        else "gains"
    )
    out.say(f"{model.title}: reinforcement learning ({tables})")
    for start, mix in model.rls:
        name = _rl_name(key, start, mix)
        origin = f"{key}_base" if start == "base" else f"{key}_mid_{start}"
        title = f"{start if start == 'base' else start.upper()} -> RL {_mix_title(mix)}"
        words = (
            f"run_dir={_run(name)}",
            f"init.checkpoint={_run(origin)}",
            f"prompts=data/prompts/{mix}",
            "world_size=${variables.rl_gpus}",
        )
        longer = ("steps=2000",) if key == "granite4micro" and mix == "mcs_unbalanced" else ()  # Figure 17
        out.stage(name, "rl", _recipe(key, "rl"), *words, *longer, model=f"{model.title}: {title}", after=["mixes"])
        _measure(out, key, name, title)
    if key == "granite33":
        out.say(
            "The curves over RL's steps: the paper's rows are those of each row's best step, chosen on the test sets; ours are the last step's"
        )
        for start in ("mcs", "base"):
            run = _rl_name(key, start, "mcs_unbalanced")
            steps = [[f"model.checkpoint={_run(run)}/checkpoints/step_{step:08}", f"out={_run(f'{run}_curve/{step}')}"] for step in CURVE]
            out.stage(f"{run}_curve", "evaluate", "configs/base/reasoning_eval.yaml", *model.analyzed, after=[run], array=steps)


def _rl_name(key: str, start: str, mix: str) -> str:
    return f"{key}_{start}_rl_{mix.removesuffix('_unbalanced')}"


def _mix_title(mix: str) -> str:
    return mix.removesuffix("_unbalanced").replace("mcs", "MCS").replace("mc", "MC").replace("_", " ")


def _analyze(out: Writer, key: str) -> None:
    """What changed, of base, MCS and MCS -> RL MCS."""
    model = MODELS[key]
    base, mid, rl = f"{key}_base", f"{key}_mid_mcs", f"{key}_mcs_rl_mcs"
    out.say(f"{model.title}: analyses (Tables 12, 13, 15, 22, 23; cosine, CKA, landscape, responses)")
    pairs = [("mcs", base, mid, f"{key}_mid_mc"), ("rl", mid, rl, None)]
    pairs += [("again", base, mid, f"{mid}_again"), ("mc", base, f"{key}_mid_mc", None)] if key == "granite33" else []
    pairs += [("mc_rl", f"{key}_mid_mc", f"{key}_mc_rl_mc", None)] if ("mc", "mc_unbalanced") in model.rls else []
    pairs += [("mc", base, f"{key}_mid_mc", None)] if key == "nemotronh" else []
    pairs += [("base_rl", base, f"{key}_base_rl_mcs", None)] if ("base", "mcs_unbalanced") in model.rls else []
    for name, first, other, against in pairs:
        words = ("--base", _run(first), "--other", _run(other), *(("--against", _run(against)) if against else ()))
        out.stage(f"{key}_weights_{name}", "analyze", "weights", *words)
    out.stage(f"{key}_weights_rl_by_step", "analyze", "weights", "--run", _run(rl), "--base", _run(mid))  # and in fp32 main weights
    for name, first, other in (("mcs", base, mid), ("rl", mid, rl)):
        out.stage(f"{key}_spectra_{name}", "analyze", "spectra", "--base", _run(first), "--other", _run(other))
    places = [
        f"models.{number}.hf={place}" for number, place in enumerate((f"${{variables.hf}}/{model.hf}", _run(f"{mid}_hf"), _run(f"{rl}_hf")))
    ]
    out.stage(f"{key}_cka", "analyze", "cka", "configs/analyses/cka.yaml", *places, f"out={_run(f'{key}_cka')}", "world_size=1")
    _landscape(out, key, (base, mid, rl))


def _landscape(out: Writer, key: str, models: Sequence[str]) -> None:
    """The path and the plane, asked as Table 15 says: so the responses at its ends are that table's."""
    places = [f"{name}_model.checkpoint={_run(place)}" for name, place in zip(("base", "mid", "rl"), models, strict=True)]
    asked = ("tasks.math500.limit=200", "tasks.math500.num_samples=8", "tasks.math500.max_tokens=7680")
    losses = f"tasks.losses.held_out.mixture={_run(f'{key}_data_mcs')}"
    folder = f"{key}_landscape"
    out.stage(
        folder,
        "analyze",
        "landscape",
        "configs/base/landscape.yaml",
        *places,
        f"out={_run(folder)}",
        "plane_size=5",
        *asked,
        losses,
        *MODELS[key].analyzed,
    )
    ends = [f"{name}={_run(folder)}/points/{name}" for name in ("base", "mid", "rl")]
    out.stage(f"{key}_responses", "analyze", "responses", *ends, "--task", "math500")


def _contamination(out: Writer) -> None:
    out.say("What of the evaluation sets stands in the training data (ours: the paper does not say)")
    against = [word for name in BENCHMARKS for word in ("--against", f"{name}=data/evaluation/{name}.jsonl")]
    out.stage("contamination_mixture", "contaminate", _run("granite33_data_mcs"), *against, "--out", _run("contamination_mixture"))
    out.stage(
        "contamination_prompts",
        "contaminate",
        "data/prompts/mcs_unbalanced",
        *against,
        "--out",
        _run("contamination_prompts"),
        after=["mixes"],
    )


def _report(out: Writer) -> None:
    out.say("One page of all")
    last = [name for name in out.names if name not in out.needed]
    out.stage("report", "report", "${run_dir}", "--out", _run("report"), after=last)


def main() -> int:
    wanted = text()
    if "--check" not in sys.argv:
        (ROOT / FILE).write_text(wanted)
    is_current = (ROOT / FILE).read_text() == wanted
    print(f"{FILE}: {wanted.count('- {name')} stages" if is_current else f"{FILE}: not what this writes; run python tools/make_study.py")
    return 0 if is_current else 1


if __name__ == "__main__":
    sys.exit(main())
