"""Nothing that a user writes means anything to bash or sbatch: hostile texts in every field of a cluster and a command arrive as written."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.check.cluster import check_cluster
from megatron_prism.core.config import ClusterConfig, ContainerConfig, CpuConfig
from tests.unit.launch.job_script import Start, ended, given, job

PARTS = [
    "'",
    '"',
    "`touch pwned`",
    "$(touch pwned)",
    "${HOME}",
    "\\",
    "\n",
    ";",
    "&",
    "|",
    ">",
    "<",
    "*",
    "?",
    "~",
    "#",
    " ",
    "\t",
    "!",
    "%j",
    "%%",
    "=",
    "--",
    "(",
    ")",
    "{a,b}",
    "$",
    "\r",
    "\x1b[31m",
    "\u00e9",
    "\u4e2d\u6587",
    "\U0001f600",
    "\u202e",
    "EOF",
    "a",
    "-n",
    "$'\\n'",
    "#SBATCH --x",
    "\n#SBATCH --x",
    "{{ 1 }}",
    "{% x %}",
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("number", range(metafunc.config.getoption("--soak") or 200))


@pytest.fixture(scope="module")
def texts(soak: int | None, request: pytest.FixtureRequest) -> list[str]:
    return hostile(soak or 200, request.config.getoption("--soak-seed") or 0)


def hostile(count: int, seed: int) -> list[str]:
    """Return texts that would do harm where they are not quoted: each part alone, then mixtures."""
    draw = random.Random(seed)
    mixed = ["".join(draw.choices(PARTS, k=draw.randint(2, 6))) for _ in range(count - len(PARTS))]
    return [*PARTS, *mixed]


def one_line(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable()) or "a"


def in_a_path(text: str) -> str:
    return one_line(text).replace("/", "_").replace("\\", "_").strip(".")[:40] or "a"


def test_every_text_arrives_as_it_was_written(number: int, texts: list[str], run: Start, tmp_path: Path) -> None:
    text, other, third = (texts[(number + step) % len(texts)] for step in (0, 67, 131))
    mount, venv = f"/a{one_line(text).replace(',', '').replace(':', '')}:/b", tmp_path / in_a_path(other)
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "activate").write_text("export ACTIVATED=yes\n")
    common: dict[str, Any] = {
        "gpus_per_node": 8,
        "setup": (("record", text, other),),
        "account": one_line(text),
        "partition": one_line(other),
        "qos": one_line(third),
        "gres": one_line(text),
        "mem": one_line(other),
        "sbatch": (f"--comment={one_line(text)}",),
    }
    stage = job(
        Path(in_a_path(third)) / "slurm", command=("prepare", text, other), array={0: (third, text)}, environment={"A": text, "B": other}
    )
    for cluster in (
        ClusterConfig(venv=venv, **common),
        ClusterConfig(container=ContainerConfig(image=text, mounts=(mount,), workdir=third), **common),
    ):
        assert check_cluster(cluster) == []
        code, output = ended(run(stage, cluster))
        assert code == 0, output
        arguments, variables = given(tmp_path / "srun.argv"), given(tmp_path / "srun.env")
        assert arguments[arguments.index("prism") + 1 :] == ["prepare", text, other, third, text, "--nproc", "8"]
        assert given(tmp_path / "record.argv") == [text, other]
        assert {f"A={text}", f"B={other}"} <= set(variables)
        if cluster.container:
            assert {f"--container-image={text}", f"--container-mounts={mount}", f"--container-workdir={third}"} <= set(arguments)
        else:
            assert "ACTIVATED=yes" in variables
        options = as_sbatch_reads((tmp_path / "script.sbatch").read_text())
        wanted = [
            f"--account={one_line(text)}",
            f"--partition={one_line(other)}",
            f"--qos={one_line(third)}",
            f"--gres={one_line(text)}:8",
            f"--mem={one_line(other)}",
            f"--comment={one_line(text)}",
            f"--output={in_a_path(third).replace('%', '%%')}/slurm/train.%A_%a.out",
        ]
        assert [option for option in wanted if option not in options] == []
        assert len(options) == 16
    assert not [path for path in tmp_path.rglob("pwned")]
    assert (tmp_path / stage.folder / "train_0.events").read_text().endswith(" done\n")


def as_sbatch_reads(script: str) -> list[str]:
    """Return the options of a script as sbatch parses its #SBATCH lines: up to the first command; quotes of both kinds, backslashes, comments.

    Compared with the real one in tests/e2e/test_slurm.py.
    """
    options = []
    for line in script.split("\n"):
        if line and not line.startswith("#"):
            break
        if not line.startswith("#SBATCH"):
            continue
        found, quote_mark, escaped = "", "", False
        for letter in line.removeprefix("#SBATCH").strip(" "):
            if escaped:
                found, escaped = found + letter, False
            elif letter == "\\":
                escaped = True
            elif quote_mark:
                found, quote_mark = (found, "") if letter == quote_mark else (found + letter, quote_mark)
            elif letter in "'\"":
                quote_mark = letter
            elif letter in " #":
                break
            else:
                found += letter
        options.append(found)
    return options


FIELDS = ["account", "partition", "qos", "gres", "mem", "cpu.partition", "cpu.mem", "sbatch.0"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("text", ["a\nb", "a\n#SBATCH --x", "a\rb", "\n", "a\x00b", "a\x1b[0m", "a\u2028b", ""])
def test_a_line_break_in_an_option_is_refused(field: str, text: str) -> None:
    changes: dict[str, Any] = {field: text}
    if field.startswith("cpu."):
        changes = {"cpu": CpuConfig(**{field[4:]: text})}
    elif field == "sbatch.0":
        changes = {"sbatch": (f"--comment={text}" if text else "",)}
    problems = check_cluster(ClusterConfig(gpus_per_node=8, **changes))
    assert field in {problem.where for problem in problems}


@pytest.mark.parametrize("text", ["a\0b", "\0", "\ud800"])
@pytest.mark.parametrize("field", ["venv", "setup", "environment", "image", "mounts"])
def test_what_no_process_can_be_given_is_refused(field: str, text: str) -> None:
    changes: dict[str, Any] = {
        "venv": {"venv": Path(text)},
        "setup": {"setup": (("a", text),)},
        "environment": {"environment": {"A": text}},
        "image": {"container": ContainerConfig(image=text)},
        "mounts": {"container": ContainerConfig(image="a", mounts=(f"{text}:a",))},
    }[field]
    assert [problem for problem in check_cluster(ClusterConfig(gpus_per_node=8, **changes)) if field in problem.where]
