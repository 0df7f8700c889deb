"""Configs that are wrong in every way we could think of: each is accepted, or refused in lines that name what is wrong.

The repository's own configs are changed and given to `prism train|prepare --dry-run`. Whatever comes: exit code 0, or 2 with lines
`prism: FILE:KEY: found ...; required ...`; no other exception, and no config that keeps a process busy: ten seconds of its time.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from megatron_prism import cli
from megatron_prism.core.config import PrepareConfig, SourceConfig

from .config_changes import CONFIGS, TOPS, Case, make

EXAMPLES, LIMIT_S = 300, 10.0
LINE = re.compile(r"prism: .+: found .*; required .+")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> dict[str, str]:
    """Return overrides that give a training config a tokenizer and data that are there, so that all its checks are reached."""
    from megatron_prism.jobs import prepare

    root = tmp_path_factory.mktemp("real")
    (root / "a.txt").write_text("\n\n".join(f"The sum of {n} and {n} is {n + n}." for n in range(200)))
    source = SourceConfig(name="a", path=(str(root / "a.txt"),), weight=100.0, split="paragraph")
    prepare.run(PrepareConfig(out=root / "data", tokenizer=tiny_tokenizer, sources=(source,), num_workers=1))
    return {"data.prepared": str(root / "data"), "init.tokenizer": str(tiny_tokenizer), "run_dir": str(root / "run")}


def run(case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, float]:
    """Return the exit code, what was said on standard error, and the seconds; any other exception passes."""
    monkeypatch.setattr(sys, "argv", ["prism", case.command, str(case.config), *case.overrides, "--dry-run"])
    capsys.readouterr()
    start = time.process_time()
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    return code, capsys.readouterr().err, time.process_time() - start


def faults(code: int, said: str, seconds: float) -> list[str]:
    """Return what a user could complain of."""
    found = [f"exit code {code}"] if code not in (0, 2) else []
    found += [f"{seconds:.1f} s"] if seconds > LIMIT_S else []
    if code == 2:
        lines = said.splitlines()
        found += [
            f"a line that names no place: {line!r:.300}"
            for line in lines
            if not LINE.fullmatch(line) or not re.search(r"[./]|override", line.split(": found ")[0])
        ]
        found += [] if lines else ["nothing is said"]
        found += ["not printable"] if not said.replace("\n", "").isprintable() else []
    return found


def test_a_changed_config_is_accepted_or_refused_in_lines(
    tmp_path: Path,
    real: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    soak: int | None,
    request: pytest.FixtureRequest,
) -> None:
    rng = random.Random(request.config.getoption("--soak-seed") or 0)
    wrong: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for top, command in TOPS.items():  # the first call of each command imports much
        run(Case(command, CONFIGS / top, [], "unchanged"), monkeypatch, capsys)
    for _ in range(soak or EXAMPLES):
        case = make(tmp_path / "configs", real, rng)
        try:
            code, said, seconds = run(case, monkeypatch, capsys)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong[f"{case.command} {case.config.name}: {case.done}"] = [f"{type(error).__name__}: {error!s:.300}"]
            continue
        counts["accepted" if code == 0 else "refused"] += 1
        if found := faults(code, said, seconds):
            wrong[f"{case.command} {case.config.name}: {case.done}"] = found
    if soak:
        with capsys.disabled():
            print(dict(counts))
    assert not wrong, f"{len(wrong)} of {soak or EXAMPLES}\n" + "\n".join(f"{done}\n    {found}" for done, found in wrong.items())
    assert min(counts["accepted"], counts["refused"]) >= counts.total() // 20, counts


@pytest.mark.parametrize("seed", range(5))
def test_so_does_the_command_line_as_a_process(tmp_path: Path, real: dict[str, str], seed: int) -> None:
    case = make(tmp_path / "configs", real, random.Random(100 + seed))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_prism.cli", case.command, str(case.config), *case.overrides, "--dry-run"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, (case, done.stderr)
    assert not faults(done.returncode, done.stderr, 0.0), case


def test_the_faults_are_seen() -> None:
    assert not faults(2, "prism: a.yaml:steps: found -1; required at least 1\n", 0.1)
    assert not faults(0, "anything", 0.1)
    for code, said, seconds in [
        (1, "", 0.1),
        (2, "", 0.1),
        (2, "Traceback\n", 0.1),
        (2, "prism: a.yaml: found \x1b; required b\n", 0.1),
        (0, "", 11.0),
        (2, "prism: x: found a; required b\n", 0.1),
    ]:
        assert faults(code, said, seconds)
