"""What a stranger's checkpoint can do: be refused, or be read. It never runs.

Every payload is `os.system`, and would leave a file: the marker. Controls: the same pickle does run where nothing guards it.
"""

from __future__ import annotations

import codecs
import io
import json
import pickle
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_prism.checkpoint import folder, torch_dist, unpickle
from megatron_prism.core.config import PrepareConfig, SourceConfig
from megatron_prism.core.errors import CheckpointError
from megatron_prism.jobs import prepare

from .conftest import Payload, saved

WORKER = Path(__file__).with_name("hostile_worker.py")
MODEL = {
    "family": "llama",
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 4,
    "vocab_size": 390,
    "max_position_embeddings": 64,
}
RUNS = "a pickle that names posix.system"


# A run's checkpoint, as training, Megatron-Core and an export load it


def metadata(state: Path, payload: Payload) -> None:
    (state / ".metadata").write_bytes(pickle.dumps(payload))


def metadata_within(state: Path, payload: Payload) -> None:
    def change(found: dcp.Metadata) -> None:
        found.planner_data = {"deep": [payload]}

    change_metadata(state, change)


def other_folder(state: Path, payload: Payload) -> None:
    (state.parents[2] / "outside").write_bytes(saved(torch.zeros(1)))

    def change(found: dcp.Metadata) -> None:
        for index, place in found.storage_data.items():  # type: ignore[union-attr]
            found.storage_data[index] = _StorageInfo("../../../outside", place.offset, place.length)  # type: ignore[index]

    change_metadata(state, change)


def common(state: Path, payload: Payload) -> None:
    (state / "common.pt").write_bytes(saved({"optimizer": payload}))


def generators(state: Path, payload: Payload) -> None:
    replace_object(state, "generators/shard_0_1", [{"host": payload}])


def extra_state(state: Path, payload: Payload) -> None:
    replace_object(state, "decoder.layers.0.self_attention.linear_qkv._extra_state/shard_0_1", [payload])


def optimizer(state: Path, payload: Payload) -> None:
    if not (state / "common.pt").exists():  # Megatron-Core 0.19
        replace_object(state, "common_state/shard_0_1", [{"optimizer": payload}])
        return
    held = torch.load(state / "common.pt", weights_only=True)
    held["optimizer"]["step"] = payload
    torch.save(held, state / "common.pt")


def legitimate(state: Path, payload: Payload) -> None:
    pass


def change_metadata(state: Path, change: Callable[[dcp.Metadata], None]) -> None:
    found = pickle.loads((state / ".metadata").read_bytes())
    change(found)
    (state / ".metadata").write_bytes(pickle.dumps(found))


def replace_object(state: Path, key: str, value: Any) -> None:
    """Store another object under a key: at the end of its file, where .metadata then says it is."""

    def change(found: dcp.Metadata) -> None:
        (index,) = [index for index in found.storage_data if index.fqn == key]  # type: ignore[union-attr]
        file, data = state / found.storage_data[index].relative_path, saved(value)  # type: ignore[index]
        found.storage_data[index] = _StorageInfo(file.name, file.stat().st_size, len(data))  # type: ignore[index]
        with file.open("ab") as stream:
            stream.write(data)

    change_metadata(state, change)


# (how a run is changed; what the guard says, and of which file; whether it runs without the guard)
CHANGED: dict[Callable[[Path, Payload], None], tuple[str, str, bool]] = {
    metadata: (RUNS, "/state/.metadata", True),
    metadata_within: (RUNS, "/state/.metadata", True),
    other_folder: ("files of other folders", "/state/.metadata", False),
    common: (RUNS, "/state/common.pt", False),
    generators: (RUNS, ".distcp: generators/shard_0_1", True),
    extra_state: (RUNS, ".distcp: decoder.layers.0.self_attention.linear_qkv._extra_state/shard_0_1", True),
    optimizer: (RUNS, "/state/", False),
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Return a run of one step: weights, optimizer and generators."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "a.txt").write_text("\n\n".join(f"The sum of {n} and {n} is {n + n}." for n in range(50)))
    source = SourceConfig(name="a", path=(str(root / "a.txt"),), weight=100.0, split="paragraph")
    prepare.run(PrepareConfig(out=root / "data", tokenizer=tiny_tokenizer, sources=(source,), num_workers=1))
    values = {
        "run_dir": str(root / "run"),
        "steps": 1,
        "precision": "fp32",
        "model": MODEL,
        "init": {"tokenizer": str(tiny_tokenizer)},
        "data": {"prepared": str(root / "data"), "seq_length": 32},
        "batch": {"global_size": 2},
    }
    (root / "train.yaml").write_text(yaml.safe_dump(values))
    done = subprocess.run([sys.executable, "-m", "megatron_prism.cli", "train", str(root / "train.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root / "run"


@pytest.fixture(scope="module")
def loaded(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Change a copy of the run in each way, load all of them in one process, and return what came of each."""
    root = tmp_path_factory.mktemp("changed")
    for change in (*CHANGED, legitimate):
        copy = root / "runs" / change.__name__
        shutil.copytree(run_dir, copy)
        change(folder.read(copy).state, Payload(root / f"{change.__name__}.marker"))
    return worker(root)


def worker(root: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(WORKER), str(root), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((root / "loaded.json").read_text())


@pytest.mark.parametrize("change", CHANGED, ids=lambda change: change.__name__)
def test_a_changed_checkpoint_is_refused_and_does_not_run(loaded: dict[str, Any], change: Callable) -> None:
    found, (said, place, runs) = loaded[change.__name__], CHANGED[change]
    assert not any(found[way]["ran"] for way in ("training", "export", "guarded"))
    assert found["training"]["error"] == found["guarded"]["error"] == "CheckpointError", found
    assert said in found["guarded"]["text"] and place in found["guarded"]["text"]
    assert found["unguarded"]["ran"] or not runs, "the control does not run"
    if ".metadata" in place:
        assert found["export"]["error"] == "CheckpointError" and said in found["export"]["text"]


def test_what_a_run_saved_still_loads(loaded: dict[str, Any]) -> None:
    assert {way: found["error"] for way, found in loaded["legitimate"].items()} == dict.fromkeys(
        ("training", "export", "guarded", "unguarded")
    )


def test_the_guard_is_there_while_layers_take_their_state_and_leaves_no_trace(loaded: dict[str, Any]) -> None:
    assert {name: found["text"] for name, found in loaded["guard"].items()} == {"restored": "", "while layers take their state": ""}


@pytest.fixture(scope="module")
def extra(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not (Path(sys.prefix) / "transformer_engine_python").is_dir():
        pytest.skip("Transformer Engine's Python half is absent (tools/setup.sh)")
    root = tmp_path_factory.mktemp("extra")
    (root / "extra_state.pkl").write_bytes(pickle.dumps(Payload(root / "te.marker")))
    return worker(root, "te")


@pytest.mark.parametrize("reader", ["module", "operation", "grouped"])
def test_transformer_engines_extra_state_does_not_run(extra: dict[str, Any], reader: str) -> None:
    guarded, unguarded = extra[reader]["guarded"], extra[reader]["unguarded"]
    if reader == "grouped" and unguarded["error"] == "UnpicklingError":  # Megatron-Core 0.19 refuses it itself, before the guard is asked
        assert guarded == unguarded and not unguarded["ran"]
        return
    assert (guarded["error"], guarded["ran"], unguarded["ran"]) == ("CheckpointError", False, True), extra[reader]
    assert RUNS in guarded["text"] and "_extra_state" in guarded["text"]


@pytest.mark.parametrize(
    "recipe", ["DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling"]
)
def test_transformer_engines_recipes_are_read(extra: dict[str, Any], recipe: str) -> None:
    assert extra[recipe]["guarded"]["text"] == ""


# The forms in which a pickle can name what it should not


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()  # SHORT_BINUNICODE


def forms(marker: Path) -> dict[str, bytes]:
    """Return pickles that run the payload, by how they come to it."""
    payload = Payload(marker)
    said = b"S'%s'\n" % payload.command.encode()
    system = b"cos\nsystem\n"
    instance = b"ctorch.distributed.checkpoint.metadata\nBytesStorageMetadata\n)\x81"
    code = b"S%s\n" % repr(f'__import__("os").system("{payload.command}")').encode()
    return {
        **{f"reduce, protocol {protocol}": pickle.dumps(payload, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)},
        "reduce, deep within": pickle.dumps({"a": [1, (2, payload)]}),
        "inst": b"(" + said + b"ios\nsystem\n.",
        "obj": b"(" + system + said + b"o.",
        "newobj": b"\x80\x02cbuiltins\nbytes\n(cbuiltins\nmap\n(" + system + b"]" + said + b"at\x81t\x81.",
        "newobj_ex": b"\x80\x04cbuiltins\nbytes\n(cbuiltins\nmap\n(" + system + b"]" + said + b"at}\x92t}\x92.",
        "build": b"\x80\x02" + instance + b"}S'__setstate__'\n" + system + b"sb" + said + b"b.",
        "a dotted name": b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93(" + said + b"tR.",
        "a dotted name of an allowed module": b"\x80\x04"
        + text("torch.distributed.checkpoint.metadata")
        + text("os.system")
        + b"\x93("
        + said
        + b"tR.",
        "names from the memo": b"\x80\x04" + text("os") + b"\x940" + text("system") + b"\x940h\x00h\x01\x93\x940h\x02(" + said + b"tR.",
        "a duplicate": b"\x80\x02" + system + b"2(" + said + b"tR0.",
        "a name of Python 2": b"c__builtin__\neval\n(" + code + b"tR.",
        "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR(" + said + b"tR.",
        "partial": b"cfunctools\npartial\n(" + system + said + b"tR)R.",
        "exec": b"cbuiltins\nexec\n(" + code + b"tR.",
        "an import": b"cevil_module\nname\n.",
    }


FORMS = list(forms(Path("marker")))


def metadata_of(tmp_path: Path, data: bytes) -> torch_dist.TensorReader:
    (tmp_path / ".metadata").write_bytes(data)
    return torch_dist.TensorReader(tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_pickle_runs(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_module.py").write_text(f"import os\nname = os.system({Payload(marker).command!r})\n")
    data = forms(marker)[form]
    with pytest.raises(CheckpointError, match=r"/.metadata: found a pickle that names "):
        metadata_of(tmp_path, data)
    assert not marker.exists() and "evil_module" not in sys.modules
    pickle.loads(data)
    assert marker.exists(), "the control does not run"
    sys.modules.pop("evil_module", None)


def test_tensors_within_a_pickle_are_read_by_weights_only(tmp_path: Path, marker: Path) -> None:
    data = (
        b"\x80\x04"
        + text("torch.storage")
        + text("_load_from_bytes")
        + b"\x93(B%st\x52." % (lambda inner: len(inner).to_bytes(4, "little") + inner)(saved(Payload(marker)))
    )
    with pytest.raises(CheckpointError, match=RUNS):
        metadata_of(tmp_path, data)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["metadata\nMetadata", "metadata\n_MEM_FORMAT_ENCODING", "planner\nWriteItemType"])
def test_a_pickle_changes_no_class(tmp_path: Path, name: str) -> None:
    data = b"ctorch.distributed.checkpoint.%s\n(N}S'evil'\nI1\nstb." % name.encode()
    with pytest.raises(CheckpointError, match="a new state for"):
        metadata_of(tmp_path, data)
    changed = pickle.loads(data)
    assert changed.evil == 1, "the control does not change it"
    del changed.evil


def test_another_allowed_object_is_not_metadata(tmp_path: Path) -> None:
    for other in (
        torch.Size([1]),
        dcp.StorageMeta(),
        {"state_dict_metadata": {}},
        dcp.Metadata({"a": 1}),
        dcp.Metadata({}, storage_data={1: 2}),
    ):  # type: ignore[dict-item]
        with pytest.raises(CheckpointError, match="another layout"):
            metadata_of(tmp_path, pickle.dumps(other))


WATCHED = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "exec",
    "compile",
    "import",
    "open",
    "pickle.find_class",
)


class Watch:
    """Notes what the interpreter's own audit reports while it is on."""

    def __init__(self) -> None:
        self.on, self.seen = False, set[tuple]()
        sys.addaudithook(self.note)  # stays for the process

    def note(self, event: str, arguments: tuple) -> None:
        if self.on and event in WATCHED:
            self.seen.add((event, *map(str, arguments[:2])))


def mutated(data: bytes, hostile: list[bytes], rng: random.Random) -> bytes:
    """Return data with bytes changed, cut out, put in or moved, or a hostile pickle in the middle of it."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at, kind = rng.randrange(len(changed)), rng.randrange(5)
        end = at + rng.randrange(1, 24)
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            del changed[at:end]
        elif kind == 2:
            changed[at:at] = rng.randbytes(end - at)
        elif kind == 3:
            changed[at:at] = rng.choice(hostile).removesuffix(b".")
        else:
            to = rng.randrange(len(changed))
            changed[to : to + end - at] = changed[at:end]
    return bytes(changed)


def test_a_damaged_metadata_is_refused_or_read_and_never_runs(
    run_dir: Path, marker: Path, soak: int | None, request: pytest.FixtureRequest
) -> None:
    rng = random.Random(request.config.getoption("--soak-seed") or 0)
    whole, hostile, watch, counts = (
        (folder.read(run_dir).state / ".metadata").read_bytes(),
        list(forms(marker).values()),
        Watch(),
        Counter[str](),
    )
    wanted = unpickle._load_metadata([], io.BytesIO(whole))
    codecs.lookup("raw_unicode_escape")  # Python's own, which one kind of text in a pickle makes it import: no choice of the pickle's
    for _ in range(soak or 300):
        data = mutated(whole, hostile, rng)
        watch.on = True
        try:
            found = unpickle._load_metadata([], io.BytesIO(data))
            outcome = "equal" if found == wanted else "other values"
        except CheckpointError:
            outcome = "refused"
        finally:
            watch.on = False
        counts[outcome] += 1
        assert not marker.exists(), data
    if soak:
        print(*sorted(counts.items()), sep="\n")
    allowed = {("pickle.find_class", module, name) for module, names in unpickle.ALLOWED.items() for name in names}
    assert watch.seen <= allowed, watch.seen - allowed
    assert watch.seen and counts["refused"] > counts.total() // 2
