"""Texts that YAML would read as numbers, truth values or dates stay as they were written where the key takes text, and only there."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prism.core.config import ClusterConfig, PipelineConfig, PrepareConfig, TrainConfig
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import load, to_yaml

TEXTS = [
    "24:00:00",
    "4:00:00",
    "30",
    "0123",
    "0x1F",
    "1_000",
    "1e3",
    "12.10",
    ".5",
    "-7",
    "no",
    "yes",
    "On",
    "True",
    "2024-01-02",
    "2024-01-02 03:04:05",
    "=",
    ".inf",
    "a",
]


def cluster(tmp_path: Path, text: str, *overrides: str) -> ClusterConfig:
    (tmp_path / "c.yaml").write_text(text)
    return load(tmp_path / "c.yaml", ClusterConfig, overrides)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("style", ["{}", '"{}"', "'{}'", "{} # a comment"])
def test_a_text_is_what_was_written(tmp_path: Path, text: str, style: str) -> None:
    written = style.format(text)
    config = cluster(
        tmp_path,
        f"gpus_per_node: 8\naccount: {written}\ntime_limit: {written}\nvenv: {written}\ncpu:\n  mem: {written}\n"
        f"environment:\n  NCCL_DEBUG: {written}\n  {text}: b\nsetup:\n- [module, load,\n   {written}\n  ]\n",
    )
    texts = (config.account, config.time_limit, str(config.venv), config.cpu.mem, config.environment["NCCL_DEBUG"], config.setup[0][2])
    assert set(texts) == {text} and config.environment[text] == "b" and config.gpus_per_node == 8
    config = cluster(
        tmp_path, "gpus_per_node: 8\n", f"account={written}", f"environment.A={written}", f"environment={{B: {text}}}", f"setup=[[{text}]]"
    )
    assert (config.account, config.environment, config.setup) == (text, {"A": text, "B": text}, ((text,),))
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "again.yaml", ClusterConfig) == config


def test_null_stays_null_and_other_types_stay_themselves(tmp_path: Path) -> None:
    config = cluster(
        tmp_path, "gpus_per_node: 0x8\naccount: null\npartition: ~\nqos:\nmax_restarts: 1_0\nexclusive: no\nsignal_before_s: 1:00\n"
    )
    assert (config.gpus_per_node, config.account, config.partition, config.qos) == (8, None, None, None)
    assert (config.max_restarts, config.exclusive, config.signal_before_s) == (10, False, 60)
    assert cluster(tmp_path, "gpus_per_node: 8\naccount: 5\n", "account=null").account is None
    with pytest.raises(InputError, match="gpus_per_node: found '8'"):
        cluster(tmp_path, 'gpus_per_node: "8"\n')


def test_aliases_merge_keys_bases_and_layouts_are_read_alike(tmp_path: Path) -> None:
    """A scalar that an alias repeats is a number in one key and a text in another."""
    config = cluster(tmp_path, "gpus_per_node: &n 010\naccount: *n\ncpu: &c {mem: 64, cpus_per_task: 4}\n")
    assert (config.gpus_per_node, config.account, config.cpu.mem, config.cpu.cpus_per_task) == (8, "010", "64", 4)
    config = cluster(tmp_path, "<<: [{account: 07, gpus_per_node: 8}, {qos: no}]\n")
    assert (config.account, config.gpus_per_node, config.qos) == ("07", 8, "no")
    (tmp_path / "base.yaml").write_text(
        "steps: 8\nrun_dir: 2024\ndata: {prepared: 1, seq_length: 8, weights: {no: 60, 1: 40}}\nbatch: {global_size: 8}\n"
    )
    (tmp_path / "run.yaml").write_text("base: base.yaml\nworld_size: 8\nlayouts: {8: {environment: {A: off}, precision: bf16}}\n")
    train = load(tmp_path / "run.yaml", TrainConfig, ["data.weights.no=50", "data.weights.1=50"])
    assert (str(train.run_dir), train.environment, train.data.weights) == ("2024", {"A": "off"}, {"no": 50.0, "1": 50.0})


def test_entries_of_lists_and_their_bases_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text("name: 007\npath: [1.50]\n")
    (tmp_path / "mix.yaml").write_text(
        "out: 1\ntokenizer: 2\nsources:\n- base: part.yaml\n  weight: 100\n  sample: {field: lang, counts: {no: 2, 1: 3}}\n"
        "  keep: [{field: a, one_of: [no, 1.0]}, {field: b, equals: 1}, {field: c, equals: false}]\n"
    )
    (source,) = load(tmp_path / "mix.yaml", PrepareConfig, ["sources.0.domain=0"]).sources
    assert (source.name, source.path, source.domain, source.sample.counts) == ("007", ("1.50",), "0", {"no": 2, "1": 3})
    assert [(keep.one_of, keep.equals) for keep in source.keep] == [(("no", "1.0"), None), ((), 1), ((), False)]
    (tmp_path / "pipe.yaml").write_text(
        "name: 1\nrun_dir: r\nstages:\n- {name: 2, command: [convert, verify, --tokens, 64], array: [[seed=1], [2]]}\n"
    )
    pipeline = load(tmp_path / "pipe.yaml", PipelineConfig)
    assert (pipeline.name, pipeline.stages[0].command[3], pipeline.stages[0].array) == ("1", "64", (("seed=1",), ("2",)))


def test_a_number_by_interpolation_is_told_to_be_quoted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="account: found 8; required a valid string; write it in quotes"):
        cluster(tmp_path, "gpus_per_node: 8\naccount: ${gpus_per_node}\n")
    assert cluster(tmp_path, "gpus_per_node: 8\naccount: a${gpus_per_node}\n").account == "a8"


@pytest.mark.parametrize("text", ["no", "Yes", "on", "010", "0x1F", "1_000", "12:30:00"])
def test_what_may_be_a_text_or_not_is_told_to_be_quoted(tmp_path: Path, text: str) -> None:
    """`equals` takes both: read as false, `not_equals: no` would keep every record of a language."""
    mixture = "out: o\ntokenizer: t\nsources:\n- {{name: a, weight: 100, keep: [{{field: b, not_equals: {}}}]}}\n"
    (tmp_path / "m.yaml").write_text(mixture.format(text))
    with pytest.raises(InputError, match=f"m.yaml: found '{text}' in line 4, column 56, to be written in quotes"):
        load(tmp_path / "m.yaml", PrepareConfig)
    for written, value in ((f"'{text}'", text), ("false", False), ("True", True), ("-1", -1), ("0.5", 0.5), ("no one", "no one")):
        (tmp_path / "m.yaml").write_text(mixture.format(written))
        assert load(tmp_path / "m.yaml", PrepareConfig).sources[0].keep[0].not_equals == value
    with pytest.raises(InputError, match="override 'sources.0.keep.0.equals="):
        load(tmp_path / "m.yaml", PrepareConfig, [f"sources.0.keep.0.equals={text}"])


def test_a_name_of_digits_in_an_override_keeps_its_zeros(tmp_path: Path) -> None:
    assert cluster(tmp_path, "gpus_per_node: 8\n", "environment.A=1", "environment.010=b").environment == {"A": "1", "010": "b"}
