"""Every job that is a gang of processes has its check and its progress, and no other job has."""

from __future__ import annotations

from megatron_prism.jobs.gangs import GANGS
from megatron_prism.launch.pipeline import CONFIGS, GANG_JOBS


def test_the_gangs_are_those_that_a_pipeline_knows() -> None:
    assert {CONFIGS[job] for job in GANG_JOBS} == set(GANGS)
