"""Kept states: read back as written, numbered as they came, and refused by name where the file is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_prism.analysis.states import Kept, key_of
from megatron_prism.core.check.cka import STATES
from megatron_prism.core.errors import CheckpointError

STATES_PNC = torch.arange(24, dtype=torch.float32).view(2, 3, 4)


def test_they_are_read_back_by_their_key(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    keys = [key_of({"sha256": name}, [[1, 2], [3]], "fp32") for name in "ba"]
    assert kept.path(keys[0]) is None
    for number, key in enumerate(keys):
        kept.write(key, STATES_PNC + number, {"model": "base"})
    assert all(torch.equal(kept.read(key), STATES_PNC + number) for number, key in enumerate(keys))
    assert [path.name for path in sorted((tmp_path / STATES).iterdir())] == [f"00000{n}_{key}.safetensors" for n, key in enumerate(keys)]


def test_the_same_states_have_the_same_bytes(tmp_path: Path) -> None:
    about = {name: name for name in ("model", "distribution", "a", "b", "c")}
    for number in range(5):
        Kept(tmp_path / str(number)).write("ab", STATES_PNC, about)
    assert len({path.read_bytes() for path in tmp_path.glob(f"*/{STATES}/*")}) == 1


def test_another_model_prompt_or_precision_has_another_key() -> None:
    cases = [({"sha256": "a"}, [[1, 2], [3]], "fp32"), ({"sha256": "b"}, [[1, 2], [3]], "fp32"), ({"sha256": "a"}, [[1], [2, 3]], "fp32")]
    assert len({key_of(*case) for case in [*cases, ({"sha256": "a"}, [[1, 2], [3]], "bf16")]}) == 4


def test_what_was_cut_off_is_refused_by_name_and_what_was_not_renamed_is_not_there(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.write("ab", STATES_PNC, {})
    path = kept.path("ab")
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"000000_ab\.safetensors.*delete it"):
        kept.read("ab")
    path.rename(path.with_name(f".{path.name}.1.tmp"))
    assert kept.path("ab") is None
