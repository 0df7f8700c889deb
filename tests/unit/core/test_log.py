"""Progress where there is no terminal to draw a bar on."""

from __future__ import annotations

import time

import pytest
from rich.progress import Progress

from megatron_prism.core import log


@pytest.mark.parametrize("is_drawn", [False, True])
def test_progress_is_told_in_lines_where_no_bar_is_drawn(caplog: pytest.LogCaptureFixture, is_drawn: bool) -> None:
    caplog.set_level("INFO", log.NAME)
    with log.told(Progress(disable=not is_drawn), interval_s=0.05) as progress:
        progress.update(progress.add_task("math", total=8), completed=2)
        time.sleep(0.3)
    assert ("math 25 %" in caplog.text) is not is_drawn
