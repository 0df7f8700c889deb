"""A run's checkpoints by step: as stored in bf16, and in the optimizer's fp32 main weights, whose update rounding hides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megatron_prism.analysis import weights
from megatron_prism.checkpoint import at_rest, integrity, torch_dist
from megatron_prism.checkpoint.torch_dist import TensorReader, TensorSpec
from megatron_prism.cli.analyze import app
from megatron_prism.core.errors import PrismError
from megatron_prism.core.manifest import read_json, write_json
from megatron_prism.hf import as_torch, bits
from megatron_prism.jobs import analyze, analyze_trajectory, convert
from megatron_prism.report import analysis
from tests.parity.tiny import random_model

UPDATE = 1e-3  # of a weight, a step: half of bf16's spacing is 2e-3 to 4e-3 of it
FROZEN = "output_layer.weight"


def saved(root: Path, imported: Path, step: int, values: Mapping[str, torch.Tensor]) -> None:
    """Write a run's checkpoint with these fp32 main weights: rounded beside them, and the frozen one without."""
    shutil.copytree(imported, root, ignore=shutil.ignore_patterns("state", integrity.SUMS))
    write_json(root / "prism.json", {**read_json(root / "prism.json"), "step": step})
    stored = {key: value.bfloat16() for key, value in values.items()}
    stored |= {at_rest.MASTER + key: value for key, value in values.items() if key != FROZEN}
    (root / "state").mkdir()
    specs = [TensorSpec(key, tuple(value.shape), value.dtype) for key, value in stored.items()]

    def pieces(key: str) -> Iterable[bits.Bits]:
        return [as_torch.of_tensor(stored[key])]

    torch_dist.write_tensors(root / "state", specs, pieces)
    integrity.seal(root)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with base, an imported bf16 model, and run, trained from it for 1, 2 and 3 steps."""
    root = tmp_path_factory.mktemp("trajectory")
    random_model("llama").to(torch.bfloat16).save_pretrained(root / "hf")
    convert.run_import(root / "hf", root / "base", dry_run=False)
    reader = TensorReader(root / "base/state")
    values = {key: reader.read(key, shape).float() for key, shape in reader.shapes().items()}
    for step in (1, 2, 3):
        for key, value in values.items():
            sign = torch.randn(value.shape, generator=torch.Generator().manual_seed(7)).sign()  # the same way at each step
            values[key] = value if key == FROZEN else value * (1 + UPDATE * sign)
        saved(root / f"run/checkpoints/step_{step:08d}", root / "base", step, values)
    return root


def test_main_weights_show_the_update_that_rounding_hides(home: Path) -> None:
    result = analyze_trajectory.run(home / "run", home / "base", 1, 0)
    assert list(result["checkpoints"]) == ["1", "2", "3"]
    shares = []
    for step, of in enumerate(result["checkpoints"].values(), 1):
        main, stored = of["masters"], of["from_base"]["total"]
        trained = main["from_base"]["kinds"]["attention"]
        assert trained["delta"] == pytest.approx(step * UPDATE, rel=2e-3)
        assert main["from_previous"]["kinds"]["attention"]["delta"] == pytest.approx(UPDATE, rel=2e-3)
        assert trained["share_different"] > 0.99 and main["from_base"]["total"]["changed"]["0.01"] == 0
        shares.append(stored["share_different"])
    assert shares[0] == 0 and 0.2 < shares[2] < 0.8  # rounding hides the first step whole, and then doubles what it shows
    first, last = result["checkpoints"]["1"], result["checkpoints"]["3"]
    assert first["masters"]["rounding"]["delta"] == pytest.approx(first["masters"]["from_base"]["total"]["delta"], rel=1e-3)
    assert last["from_base"]["total"]["delta"] > 1.2 * last["masters"]["from_base"]["total"]["delta"]
    assert last["from_base"]["total"]["changed"]["0.005"] > 0.1 and last["masters"]["from_base"]["total"]["changed"]["0.005"] == 0
    assert result["checkpoints"]["1"]["from_base"] == result["checkpoints"]["1"]["from_previous"]


def test_two_models_are_also_compared_in_main_weights(home: Path) -> None:
    result = analyze.run_weights(home / "base", home / "run", None, 1, 0)
    assert result["masters"]["kinds"]["mlp"]["delta"] == pytest.approx(3 * UPDATE, rel=2e-3) and "tensors" not in result["masters"]
    assert any(line.startswith("total, fp32") for line in analysis.weights(result))
    assert analyze.run_weights(home / "run", home / "base", None, 1, 0)["masters"] is None  # what comes after decides


def test_what_does_not_train_has_no_main_weight_and_stays(home: Path) -> None:
    model = at_rest.read(home / "run/checkpoints/step_00000003")
    main = at_rest.masters(model)
    assert main is not None and {name for name, dtype in main.dtypes.items() if dtype.name != "float32"} == {"lm_head.weight"}
    with at_rest.opened([model, main]) as (rounded, whole):
        for name, shape in model.shapes.items():
            with rounded.tensor(name) as one, whole.tensor(name) as other:
                small = as_torch.to_tensor(one(0, shape[0]), torch.bfloat16)
                large = as_torch.to_tensor(other(0, shape[0]), as_torch.dtype_of(main.dtypes[name]))
                assert torch.equal(small, large.bfloat16()), name
    assert at_rest.masters(at_rest.read(home / "base")) is None and at_rest.masters(at_rest.read(home / "hf")) is None


def test_without_a_base_the_first_checkpoint_is_it_on_the_command_line(home: Path) -> None:
    done = CliRunner().invoke(app, ["weights", "--run", str(home / "run"), "--num-threads", "1", "--json", str(home / "a.json")])
    assert done.exit_code == 0 and len(done.output.splitlines()) == 3, done.output
    result = json.loads((home / "a.json").read_text())
    assert (result["kind"], result["analysis"]) == ("analysis", "trajectory")
    assert list(result["checkpoints"]) == ["2", "3"] and result["thresholds"] == list(weights.THRESHOLDS)
    assert result["checkpoints"]["3"]["masters"]["from_base"]["kinds"]["mlp"]["delta"] == pytest.approx(2 * UPDATE, rel=2e-3)
    with pytest.raises(PrismError, match="1 checkpoints; required two"):
        lonely = home / "lonely/checkpoints"
        lonely.mkdir(parents=True)
        shutil.copytree(home / "run/checkpoints/step_00000001", lonely / "step_00000001")
        analyze_trajectory.run(home / "lonely", None, 1, 0)
    for words in (["--run", "a", "--other", "b"], ["--base", "a"], ["--run", "a", "--against", "b"]):
        done = CliRunner().invoke(app, ["weights", *words])
        assert done.exit_code != 0 and "neither of the two ways" in str(done.exception)
