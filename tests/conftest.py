"""What the tests share: the data beside the repository, the presets, a tokenizer and models small enough to make at once,
one prepared mixture, and gangs that each train several layouts in one life.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core import log
from megatron_prism.core.config import ModelConfig
from megatron_prism.core.layers import merge, read_layers
from megatron_prism.core.load import build
from megatron_prism.core.manifest import write_text
from tests.ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "vocab_size": 390,
}
WORKER = ROOT / "tests" / "distributed" / "worker.py"
Gang = Callable[[int, list[dict[str, Any]]], dict[str, Any]]
SIZES = {
    "vocab_size": 390,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
PRESET_PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-small-24b": 23_572_403_200,
    "granite-3.3-8b": 8_170_864_640,
    "granite-4.0-micro": 3_402_836_480,
    "granite-4.0-h-micro": 3_191_396_096,
    "nemotron-h-8b": 8_100_852_736,
    "qwen2.5-7b": 7_615_616_512,
}


@pytest.fixture(scope="session")
def preset_parameters() -> dict[str, int]:
    """Return the exact parameters of each preset's model, a tied embedding counted once."""
    return PRESET_PARAMETERS


@pytest.fixture(scope="session")
def presets() -> dict[str, ModelConfig]:
    """Return the architectures of configs/models by name."""
    paths = sorted((ROOT / "configs" / "models").glob("*.yaml"))
    return {path.stem: build(merge(read_layers(path, ()))["model"], ModelConfig, str) for path in paths}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `preset_name` once for each preset."""
    if "preset_name" in metafunc.fixturenames:
        metafunc.parametrize("preset_name", PRESET_PARAMETERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let what is slow begin first: short files fill the end, when one of the two workers would run alone."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one worker run a file whole, and one all files that share the living gangs."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return "gangs" if path.startswith("tests/distributed/") or path == "tests/reliability/test_reshard.py" else path

    return Files(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", type=int, help="how many examples a test takes, in place of its own number (tools/soak.py)")
    parser.addoption("--soak-seed", type=int, help="what random.Random draws them from")


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> int | None:
    """Return how many examples are asked for, or None: the test's own number."""
    return request.config.getoption("--soak")


@pytest.fixture(autouse=True)
def unset_log() -> Iterator[None]:
    """Begin each test with a log that no job has set up, so that caplog sees a line once, whichever tests ran before."""

    def unset() -> None:
        logger = log.get()
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)

    unset()
    yield
    unset()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of test data beside the repository; without it skip, or fail under PRISM_REQUIRE_SHARED."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        absent = f"shared/data is absent: {folder}"
        if os.environ.get("PRISM_REQUIRE_SHARED"):
            pytest.fail(absent)
        pytest.skip(absent)
    return folder


def write_folder(root: Path, config: dict[str, Any], num_shards: int) -> Path:
    """Write a random LLaMA of a config.json with our rules' names, without transformers, its layers dealt over the shards."""
    import torch
    from safetensors.torch import save_file

    from megatron_prism.families import llama, registry

    root.mkdir()
    (root / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shapes = [part for rule in registry.rules(llama.read_config(config, "config.json")) for part in rule.hf]
    each = -(-len(shapes) // num_shards)
    weight_map = {}
    for index in range(num_shards):
        part = shapes[index * each : (index + 1) * each]
        file = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file({name: torch.randn(shape) for name, shape in part}, root / file, metadata={"format": "pt"})
        weight_map |= {name: file for name, _ in part}
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return root


@pytest.fixture(scope="session")
def make_folder() -> Callable[..., Path]:
    """Return a function that writes a folder: (root, changes to its config, number of shards)."""
    return lambda root, changes, num_shards: write_folder(root, CONFIG | changes, num_shards)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Hugging Face tokenizer folder: byte-level BPE of 384 tokens, `<unk>` 0, `<s>` 1, `</s>` 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    text = [f"The sum of {a} and {b} is {a + b}, their product {a * b}; return {a} + {b}\n" for a in range(30) for b in range(30)]
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096, "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


SCALARS = {"attention_multiplier": 1 / 16, "embedding_multiplier": 6.0, "residual_multiplier": 0.22, "logits_scaling": 4.0}
LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # the class's name in transformers, and its own sizes
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "granite": ("Granite", {"tie_word_embeddings": True, **SCALARS}),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": 11}),
    "nemotron": (
        "NemotronH",
        {
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "head_dim": 16,
            "layers_block_type": [LETTERS[letter] for letter in "M-M*-M-*M"],
        },
    ),
    "granite_h": (
        "GraniteMoeHybrid",
        {
            "tie_word_embeddings": True,
            **SCALARS,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "mamba_chunk_size": 16,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "position_embedding_type": None,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 176,
            "rms_norm_eps": 1e-5,
        },
    ),
}


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Callable[..., Path]:
    """Return a function that makes an imported checkpoint of a random model: (name in MODELS, changes to its sizes)."""
    import torch
    import transformers

    from megatron_prism.jobs import convert

    def make(name: str, **changes: Any) -> Path:
        folder, (kind, own) = tmp_path_factory.mktemp(name), MODELS[name]
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **changes})
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder / "hf")
        for file in tiny_tokenizer.iterdir():
            (folder / "hf" / file.name).write_bytes(file.read_bytes())
        convert.run_import(folder / "hf", folder / "ckpt", dry_run=False)
        return folder / "ckpt"

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """Return a tiny LLaMA of 5 layers with GQA; its vocabulary is padded."""
    return make_checkpoint("llama")


@pytest.fixture(scope="session")
def granite_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """Return a tiny Granite: four multipliers and tied embeddings."""
    return make_checkpoint("granite")


@pytest.fixture(scope="session")
def mistral_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """Return a tiny Mistral: each token sees 11."""
    return make_checkpoint("mistral")


@pytest.fixture(scope="session")
def nemotron_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """Return a tiny Nemotron-H: two groups of Mamba heads, so that it splits over TP 2; nine layers, uneven at PP 2."""
    return make_checkpoint("nemotron")


@pytest.fixture(scope="session")
def granite_h_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """Return a tiny Granite-4.0-H: one group, so PP and DP only; four multipliers, tied embeddings."""
    return make_checkpoint("granite_h")


@pytest.fixture(scope="session")
def tiny_mixture(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Return a prepared mixture of two sources, one with a held-out part."""
    from megatron_prism.core.config import PrepareConfig, SourceConfig
    from megatron_prism.jobs import prepare

    folder = tmp_path_factory.mktemp("mixture")
    sums = [{"text": f"The sum of {a} and {b} is {a + b}."} for a in range(60) for b in range(30)]
    code = [{"text": f"def f{a}(x):\n    return x * {a} + {b}\n"} for a in range(60) for b in range(20)]
    for name, records in (("math", sums), ("code", code)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = (
        SourceConfig(name="math", path=(str(folder / "math.jsonl"),), weight=70, valid_percent=10),
        SourceConfig(name="code", path=(str(folder / "code.jsonl"),), weight=30, valid_percent=10),
    )
    prepare.run(PrepareConfig(out=folder / "data", tokenizer=tiny_tokenizer, sources=sources, num_workers=1))
    return folder / "data"


class LivingGang:
    """A gang of one size that trains one list of cases after another: torch and Megatron-Core are imported once."""

    def __init__(self, num_processes: int, home: Path):
        self._home, self._number, self._log = home, 0, (home / "log").open("w+")
        command = [sys.executable, str(ROOT / "tests" / "gang.py"), str(num_processes), str(WORKER), str(home)]
        self._launcher = subprocess.Popen(command, stdout=self._log, stderr=self._log, start_new_session=True)

    def is_alive(self) -> bool:
        return self._launcher.poll() is None

    def train(self, folder: Path) -> dict[str, Any]:
        """Let it train the cases of a folder; return what it wrote there."""
        self._tell(str(folder))
        ends = time.monotonic() + 900
        while not (folder / "results.json").is_file():
            if not self.is_alive() or time.monotonic() > ends:
                with suppress(ProcessLookupError):
                    os.killpg(self._launcher.pid, signal.SIGKILL)
                said = (self._home / "log").read_text().splitlines()
                raise AssertionError("\n".join(line for line in said if "registered at" not in line)[-20000:])  # torch lists its dispatcher
            time.sleep(0.05)
        return json.loads((folder / "results.json").read_text())

    def end(self) -> None:
        """Let it end."""
        if self.is_alive():
            self._tell("")
            assert self._launcher.wait(60) == 0
        self._log.close()

    def _tell(self, text: str) -> None:
        self._number += 1
        write_text(self._home / f"{self._number}", text)


@pytest.fixture(scope="session")
def living_gangs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], LivingGang]]:
    """Return a function that gives the session's gang of a size, a new one where there is none or it died."""
    gangs: dict[int, LivingGang] = {}

    def get(num_processes: int) -> LivingGang:
        if num_processes not in gangs or not gangs[num_processes].is_alive():
            gangs[num_processes] = LivingGang(num_processes, tmp_path_factory.mktemp(f"living{num_processes}"))
        return gangs[num_processes]

    yield get
    for found in gangs.values():
        found.end()


@pytest.fixture(scope="session")
def run_distributed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """Return a function (fn, num_ranks, ...) that returns what a module's function fn(groups, ...) returned on each rank: tests/ranks.py."""
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks.run
    ranks.end()


@pytest.fixture(scope="session")
def gang(
    tmp_path_factory: pytest.TempPathFactory, living_gangs: Callable[[int], LivingGang], tiny_checkpoint: Path, tiny_mixture: Path
) -> Gang:
    """Return a function that trains cases one after another in a gang, and returns {case: result}.

    A case: {"name", "config": keys of TrainConfig to override, "control": a fault to build in, or None, "start_from":
    {"run_dir", "step"} of a run to be continued as if it had been killed there, or None, "save_again": whether what was
    loaded is saved at once, to the run's folder `again`, "call": {"file", "function", its further arguments} of what every rank
    computes in place of a training run; its result is rank 0's}.
    """

    def run(num_processes: int, cases: list[dict[str, Any]]) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(f"gang{num_processes}")
        base: dict[str, Any] = {
            "init": {"checkpoint": str(tiny_checkpoint)},
            "data": {"prepared": str(tiny_mixture), "seq_length": 32},
            "batch": {"global_size": 8, "micro_size": 2},
            "steps": 10,
            "precision": "fp32",
            "optimizer": {"lr": 3e-3},
            "schedule": {"warmup_steps": 2},
            "validation": {"sequences": 6},
            "save": {"timeout_s": 300},
        }
        named = []
        for case in cases:
            config = {"run_dir": str(folder / case["name"]), **base, **case["config"]}
            for section in ("data", "save"):
                config[section] = {**base[section], **case["config"].get(section, {})}
            named.append({"control": None, "start_from": None, "save_again": False, "call": None, **case, "config": config})
        (folder / "cases.json").write_text(json.dumps(named))
        return living_gangs(num_processes).train(folder)

    return run
