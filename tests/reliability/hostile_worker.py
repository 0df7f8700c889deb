"""Loads what test_hostile.py prepared, in a process that a payload may harm: FOLDER holds runs/NAME; writes FOLDER/loaded.json.

With `te`: reads FOLDER/extra_state.pkl through every set_extra_state of Transformer Engine instead (constructed on tests/te's stand-in).
"""

from __future__ import annotations

import json
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_prism.checkpoint import folder, sharded, torch_dist, unpickle
from megatron_prism.core.config import TrainConfig
from megatron_prism.core.load import load
from megatron_prism.models import build, norm
from megatron_prism.parallel import groups, host
from megatron_prism.train import optim

Outcome = dict[str, Any]


def attempt(marker: Path, run: Callable[[], Any]) -> Outcome:
    """Return what came of a load: its error, and whether the payload ran."""
    error = None
    try:
        run()
    except BaseException as raised:
        error = raised
    ran = marker.exists()
    marker.unlink(missing_ok=True)
    return {"error": error and type(error).__name__, "text": str(error or ""), "ran": ran}


def load_runs(root: Path) -> dict[str, dict[str, Outcome]]:
    """Load each run as training does, by Megatron-Core alone inside the guard, and by it outside of it; and its metadata as an export does."""
    host.install()
    from megatron.core import dist_checkpointing

    runs = sorted((root / "runs").iterdir())
    config = load(runs[0] / "config.yaml", TrainConfig)
    found: dict[str, dict[str, Outcome]] = {}
    with groups.gang(config) as grid:
        assert config.model is not None
        chunks = optim.wrap(build.build(config.model, grid, config), config)
        optimizer = optim.build(chunks, config.optimizer, config)

        def by_megatron(state: Path, optimizer: Any = optimizer) -> None:
            dist_checkpointing.load(sharded.training_state(chunks, optimizer, grid, is_loading=True), str(state))

        def by_guarded_megatron(state: Path) -> None:
            with unpickle.guarded(state):
                by_megatron(state)

        ways: dict[str, Callable[[Path], Any]] = {
            "training": lambda state: sharded.load_training(state.parent, chunks, optimizer, grid),
            "export": torch_dist.TensorReader,
            "guarded": by_guarded_megatron,
            "unguarded": by_megatron,
        }
        for run in runs:
            state = folder.read(run).state
            found[run.name] = {way: attempt(root / f"{run.name}.marker", lambda: load_it(state)) for way, load_it in ways.items()}  # noqa: B023
        found["guard"] = {"restored": attempt(root / "none", restored)}
        found["guard"]["while layers take their state"] = attempt(
            root / "none", lambda: load_while_looking(lambda: ways["training"](folder.read(root / "runs" / "legitimate").state))
        )
    return found


def is_guarded() -> bool:
    from torch.distributed.checkpoint import filesystem

    return filesystem.pickle is not pickle  # type: ignore[attr-defined]


def restored() -> None:
    assert not is_guarded()
    assert torch.load.__module__ == "torch.serialization"


def load_while_looking(load_it: Callable[[], Any]) -> None:
    """Load, and assert that a layer's set_extra_state was called inside the guard."""
    seen = []
    norm.LocalFinalNorm.set_extra_state = lambda self, state: seen.append(is_guarded())  # type: ignore[method-assign]
    load_it()
    assert seen == [True], seen


def load_extra_state(root: Path) -> dict[str, dict[str, Outcome]]:
    """Give a pickle to each reader of extra state, inside the guard and outside of it; and each recipe of TE to the guarded one."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "te"))
    import standin

    standin.install(Path(sys.prefix) / "transformer_engine_python")
    host.install()
    from megatron.core.extensions import transformer_engine as mcore
    from transformer_engine.common import recipe
    from transformer_engine.pytorch.module import base
    from transformer_engine.pytorch.ops import op

    payload = torch.frombuffer(bytearray((root / "extra_state.pkl").read_bytes()), dtype=torch.uint8)
    found: dict[str, dict[str, Outcome]] = {}
    readers: dict[str, Callable[[Any, torch.Tensor], Any]] = {
        "module": base.TransformerEngineBaseModule.set_extra_state,
        "operation": op.BasicOperation.set_extra_state,
        "grouped": mcore.TEGroupedLinear._decode_extra_state,
    }
    for name, read in readers.items():
        found[name] = {
            "guarded": attempt(root / "te.marker", lambda: guarded_call(root, read, payload)),  # noqa: B023
            "unguarded": attempt(root / "te.marker", lambda: read(types.SimpleNamespace(), payload)),  # noqa: B023
        }
    for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling"):
        found[name] = {"guarded": attempt(root / "te.marker", lambda: same_again(root, getattr(recipe, name)(), base))}  # noqa: B023
    return found


def guarded_call(root: Path, read: Callable[[Any, torch.Tensor], Any], state: torch.Tensor) -> None:
    with unpickle.guarded(root):
        read(types.SimpleNamespace(), state)


def same_again(root: Path, recipe: Any, reader: Any) -> None:
    """Assert that an FP8 state comes back from the guarded reader as it went into a pickle."""
    state = {"recipe": recipe, "scale_fwd": torch.rand(3), "extra_fp8_variables": {"num_gemms": 1, "pair": (1, 2.5)}}
    with unpickle.guarded(root):
        found = reader.pickle.loads(pickle.dumps(state))
    assert torch.equal(found.pop("scale_fwd"), state.pop("scale_fwd"))
    assert found == state and type(found["recipe"]) is type(recipe)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    results = load_extra_state(target) if sys.argv[2:] == ["te"] else load_runs(target)
    (target / "loaded.json").write_text(json.dumps(results))
