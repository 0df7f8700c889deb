"""lm-eval's 14,683 tasks, read once."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def lm_eval_manager() -> Any:
    from megatron_prism.eval.retention import lm_tasks

    return lm_tasks.manager()


@pytest.fixture(scope="session")
def lm_eval_index(lm_eval_manager: Any) -> Any:
    return lm_eval_manager.task_index
