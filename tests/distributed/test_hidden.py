"""Pooled hidden states are transformers' output_hidden_states, averaged over a text's tokens, on every layout, dense and hybrid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prism.checkpoint import folder, reference, sharded
from megatron_prism.core.config import GangConfig, ParallelConfig
from megatron_prism.models import build, hidden
from megatron_prism.parallel.groups import Groups

LENGTHS = (5, 31, 17, 1, 24, 9, 40)  # seven texts: no multiple of a microbatch on two replicas
TOLERANCE = 1e-5  # of the largest value of a state, whose sizes differ by layer
SP = {"tp": 2, "sequence_parallel": True}
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {  # model, ranks, layout
    "tiny": ("tiny", 1, {}),
    "granite": ("granite", 1, {}),
    "granite_h": ("granite_h", 1, {}),
    "nemotron": ("nemotron", 1, {}),
    "tiny tp2": ("tiny", 2, {"tp": 2}),
    "tiny tp2_sp": ("tiny", 2, SP),
    "tiny pp2": ("tiny", 2, {"pp": 2}),
    "tiny dp2": ("tiny", 2, {}),
    "tiny cp2": ("tiny", 2, {"cp": 2}),
    "granite pp2": ("granite", 2, {"pp": 2}),  # a tied embedding on both stages
    "granite_h pp2": ("granite_h", 2, {"pp": 2}),
    "nemotron tp2_sp": ("nemotron", 2, SP),
    "nemotron cp2": ("nemotron", 2, {"cp": 2}),
    "nemotron pp2": ("nemotron", 2, {"pp": 2}),
    "nemotron tp2_sp pp2": ("nemotron", 4, {**SP, "pp": 2}),
}
SLOW = [name for name, (_, num_ranks, _) in RUNS.items() if num_ranks > 1 and name not in ("tiny tp2_sp", "nemotron pp2")]


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 384, (length,), generator=generator).tolist() for length in LENGTHS]


def measured(groups: Groups, checkpoint: str, layout: dict[str, Any], out: str) -> None:
    """Let rank 0 write the states, and see that all ranks have the same."""
    model = folder.read(Path(checkpoint)).model
    chunks = build.build(model, groups, GangConfig(parallel=ParallelConfig(**layout), precision="fp32"))
    sharded.load_weights(Path(checkpoint), chunks)
    states_PNC = hidden.pooled(chunks, model, texts(), groups, micro_size=2)
    torch.save(states_PNC, f"{out}.{groups.rank}")


@pytest.fixture(scope="module")
def theirs(request: pytest.FixtureRequest) -> Callable[[str], tuple[torch.Tensor, torch.Tensor]]:
    """Return a function that gives transformers' pooled states of a model (L + 1, N, C), and the same with the mask a token late."""
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if name not in kept:
            model = reference.load(request.getfixturevalue(f"{name}_checkpoint").parent / "hf", torch.float32)
            right, late = [], []
            for text in texts():
                with torch.no_grad():  # one more token: what a mask that is one position late would take in
                    states = model(torch.tensor([[*text, 0]]), output_hidden_states=True, use_cache=False).hidden_states
                of_layers_PSC = torch.stack([state_1SC[0] for state_1SC in states])
                right.append(of_layers_PSC[:, :-1].mean(1))
                late.append(of_layers_PSC[:, 1:].mean(1))
            kept[name] = torch.stack(right, 1), torch.stack(late, 1)
        return kept[name]

    return of


def difference(ours_PNC: torch.Tensor, theirs_PNC: torch.Tensor) -> float:
    """Return the largest difference, each state's as a share of its largest value."""
    assert ours_PNC.shape == theirs_PNC.shape
    return float(((ours_PNC - theirs_PNC).abs().amax((1, 2)) / theirs_PNC.abs().amax((1, 2))).max())


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS])
def test_states_are_transformers(
    name: str,
    run_distributed: Callable[..., list[Any]],
    theirs: Callable[[str], tuple[torch.Tensor, torch.Tensor]],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    model, num_ranks, layout = RUNS[name]
    checkpoint = request.getfixturevalue(f"{model}_checkpoint")
    run_distributed(measured, num_ranks, checkpoint=checkpoint, layout=layout, out=tmp_path / "states", parallel=layout)
    first, *others = (torch.load(f"{tmp_path / 'states'}.{rank}", weights_only=True) for rank in range(num_ranks))
    assert all(torch.equal(first, other) for other in others)
    ours_PNC, (right_PNC, late_PNC) = torch.cat([first[:-2], first[-1:]]), theirs(model)  # theirs ends behind the final norm
    assert difference(ours_PNC, right_PNC) < TOLERANCE
    assert (
        difference(ours_PNC, late_PNC) > 100 * TOLERANCE
    )  # controls: a mask that is a token late, layers in another order, the last layer's own
    swapped = [0, 2, 1, *range(3, len(ours_PNC))]
    assert difference(ours_PNC[swapped], right_PNC) > 100 * TOLERANCE
    assert difference(first[:-1], right_PNC) > 100 * TOLERANCE
