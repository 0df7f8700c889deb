"""What the tests of job scripts share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.launch.job_script import Start, starter


@pytest.fixture
def run(tmp_path: Path) -> Start:
    return starter(tmp_path)
