"""The keys of a job's YAML, as frozen dataclasses: one spelling from the YAML key to the field to the metric.

Each key carries its bounds and its description (section.py). Defaults are defined here only. A default from the paper names its table; all
others are ours. docs/CONFIG.md is generated from these classes.
"""

from megatron_prism.core.config.aligner import AlignerConfig
from megatron_prism.core.config.cka import CkaConfig, ComparedConfig, DistributionConfig
from megatron_prism.core.config.cluster import ClusterConfig, ContainerConfig, CpuConfig, JobConfig, PipelineConfig
from megatron_prism.core.config.evaluate import (
    AskingConfig,
    AtRestConfig,
    EndpointConfig,
    EvaluateConfig,
    EvaluatedConfig,
    HeldOutConfig,
    LmEvalConfig,
    RulerConfig,
    TaskConfig,
)
from megatron_prism.core.config.filter import FilterConfig
from megatron_prism.core.config.gang import FP8Config, FusionConfig, GangConfig, OffloadConfig, ParallelConfig, Precision, RecomputeConfig
from megatron_prism.core.config.landscape import LandscapeConfig
from megatron_prism.core.config.merge import MergeConfig, MergeModelConfig
from megatron_prism.core.config.model import Llama3Rope, MambaConfig, ModelConfig, PresetConfig, YarnRope
from megatron_prism.core.config.nemo_rl import NemoRlConfig
from megatron_prism.core.config.policy import PolicyConfig
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
from megatron_prism.core.config.prompts import (
    Domain,
    MixConfig,
    MixDomainsConfig,
    MixRuleConfig,
    MixSetConfig,
    PromptsConfig,
    PromptSourceConfig,
)
from megatron_prism.core.config.rl import AlgorithmConfig, ReferenceConfig, RLConfig, SamplingConfig
from megatron_prism.core.config.run import GuardConfig, LimitsConfig, LogConfig, SaveConfig, ValidationConfig
from megatron_prism.core.config.study import CheckConfig, ClaimConfig, StageConfig, StudyConfig
from megatron_prism.core.config.train import (
    BatchConfig,
    DataConfig,
    InitConfig,
    MixtureChange,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "AlgorithmConfig",
    "AlignerConfig",
    "AskingConfig",
    "AtRestConfig",
    "BatchConfig",
    "CheckConfig",
    "CkaConfig",
    "ClaimConfig",
    "ClusterConfig",
    "ComparedConfig",
    "ContainerConfig",
    "CpuConfig",
    "DataConfig",
    "DecontaminateConfig",
    "DistributionConfig",
    "Domain",
    "EndpointConfig",
    "EvaluateConfig",
    "EvaluatedConfig",
    "FP8Config",
    "FilterConfig",
    "FusionConfig",
    "GangConfig",
    "GuardConfig",
    "HeldOutConfig",
    "InitConfig",
    "JobConfig",
    "KeepConfig",
    "LandscapeConfig",
    "LimitsConfig",
    "Llama3Rope",
    "LmEvalConfig",
    "LogConfig",
    "MambaConfig",
    "MergeConfig",
    "MergeModelConfig",
    "MixConfig",
    "MixDomainsConfig",
    "MixRuleConfig",
    "MixSetConfig",
    "MixtureChange",
    "ModelConfig",
    "NemoRlConfig",
    "OffloadConfig",
    "OptimizerConfig",
    "PackingConfig",
    "ParallelConfig",
    "PartConfig",
    "PipelineConfig",
    "PolicyConfig",
    "Precision",
    "PrepareConfig",
    "PresetConfig",
    "PromptSourceConfig",
    "PromptsConfig",
    "RLConfig",
    "RecomputeConfig",
    "ReferenceConfig",
    "RulerConfig",
    "RunConfig",
    "SampleConfig",
    "SamplingConfig",
    "SaveConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StageConfig",
    "StudyConfig",
    "TaskConfig",
    "TrainConfig",
    "TurnsConfig",
    "ValidationConfig",
    "YarnRope",
]
