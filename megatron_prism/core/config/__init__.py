"""What a job's YAML may say: frozen dataclasses, one spelling from the YAML key to the field to the metric.

Each key carries its bounds and its words (section.py). No default stands anywhere else. Defaults that the paper states carry its table; the
others are ours. docs/CONFIG.md is generated from here.
"""

from megatron_prism.core.config.cluster import ClusterConfig, ContainerConfig, CpuConfig, JobConfig, PipelineConfig
from megatron_prism.core.config.gang import FP8Config, GangConfig, OffloadConfig, ParallelConfig, Precision, RecomputeConfig
from megatron_prism.core.config.model import Llama3Rope, MambaConfig, ModelConfig
from megatron_prism.core.config.prepare import (
    DecontaminateConfig,
    KeepConfig,
    PackingConfig,
    PartConfig,
    PrepareConfig,
    SampleConfig,
    SourceConfig,
    TurnsConfig,
)
from megatron_prism.core.config.run import GuardConfig, LimitsConfig, LogConfig, SaveConfig, ValidationConfig
from megatron_prism.core.config.train import (
    BatchConfig,
    DataConfig,
    InitConfig,
    MixtureChange,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "BatchConfig",
    "ClusterConfig",
    "ContainerConfig",
    "CpuConfig",
    "DataConfig",
    "DecontaminateConfig",
    "FP8Config",
    "GangConfig",
    "GuardConfig",
    "InitConfig",
    "JobConfig",
    "KeepConfig",
    "LimitsConfig",
    "Llama3Rope",
    "LogConfig",
    "MambaConfig",
    "MixtureChange",
    "ModelConfig",
    "OffloadConfig",
    "OptimizerConfig",
    "PackingConfig",
    "ParallelConfig",
    "PartConfig",
    "PipelineConfig",
    "Precision",
    "PrepareConfig",
    "RecomputeConfig",
    "SampleConfig",
    "SaveConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TrainConfig",
    "TurnsConfig",
    "ValidationConfig",
]
