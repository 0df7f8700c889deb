"""A package is told from files alone: whole, absent, or installed and broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prism.grade.sandbox import choose
from megatron_prism.jobs import doctor

PACKAGE = doctor.Package("prism_made_up", "prism-made-up", "nothing", "prism_made_up_cuda")
METADATA, MODULE = "prism_made_up-1.2.dist-info/METADATA", "prism_made_up/__init__.py"
BESIDE, WITHIN = "prism_made_up_cuda.py", "prism_made_up/wheel_lib/prism_made_up_cuda.cpython-311.so"


@pytest.mark.parametrize(
    ("files", "version", "broken"),
    [
        ([], None, None),
        ([MODULE, BESIDE], None, None),
        ([METADATA, MODULE, BESIDE], "1.2", None),
        ([METADATA, MODULE, WITHIN], "1.2", None),
        ([METADATA], "1.2", "no module prism_made_up"),
        ([METADATA, "prism_made_up/data.txt"], "1.2", "no module prism_made_up"),
        ([METADATA, MODULE], "1.2", "prism_made_up_cuda"),
    ],
)
def test_a_package_is_whole_or_absent_or_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], version: str | None, broken: str | None
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(
            "Metadata-Version: 2.1\nName: prism-made-up\nVersion: 1.2\n" if name == METADATA else "raise AssertionError"
        )
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor.find(PACKAGE)
    assert found.version == version
    assert (broken in found.broken) if broken and found.broken else found.broken is broken


def test_a_required_package_that_is_broken_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", (doctor.Package("torch", "torch", "nothing runs", "no_such_module"),))
    found = doctor.run()
    assert (found["missing"], found["ok"]) == (["torch"], False)


def test_every_package_and_program_says_what_its_absence_costs() -> None:
    found = doctor.run()
    assert {
        "transformer-engine",
        "apex",
        "mamba-ssm",
        "causal-conv1d",
        "nemo-toolkit",
        "nemo-aligner",
        "vllm",
        "flash-attn",
        "math-verify",
        "lm-eval",
    } < {entry["name"] for entry in found["packages"]}
    assert {"sbatch", "srun", "git"} <= {entry["name"] for entry in found["programs"]}
    assert all(entry["absence_costs"] for entry in [*found["packages"], *found["programs"]])
    assert found["ok"], found["missing"]


def test_the_sandbox_is_the_one_that_grading_chooses_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.run()["sandbox"]["name"] == choose.choose().backend.name
    for holding in ("landlock", ""):  # where bubblewrap fails, landlock stands in
        monkeypatch.setattr(
            choose, "probe", lambda backend, _, only=holding: choose.Probe(backend, "" if backend.name == only else "it fails")
        )
        found = doctor.run()["sandbox"]
        assert found["name"] == (holding or None) and ("code is not run: nothing" in found["detail"]) == (not holding)


def test_brackets_in_what_was_found_are_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich would take them for its markup: drop them, or raise MarkupError."""
    monkeypatch.setenv("COLUMNS", "200")
    package = {"name": "a", "version": None, "broken": None, "absence_costs": "install prism[gpu] [/x]"}
    kernel = {"name": "k", "state": "fails", "ms": None, "detail": "[Errno 2] [/home]", "absence_costs": "much"}
    broken = {**package, "name": "b", "version": "1 [/y]", "broken": "no [b]"}
    sandbox = {"name": None, "detail": "not run [/z]"}
    doctor.show({"packages": [package, broken], "programs": [], "sandbox": sandbox, "kernels": [kernel], "devices": ["[0] H100"]})
    shown = capsys.readouterr().out
    for text in ("not run [/z]", "prism[gpu] [/x]", "[Errno 2] [/home] (much)", "1 [/y], broken", "no [b]", "[0] H100", "absent"):
        assert text in shown
