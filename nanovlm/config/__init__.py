"""Every setting of a model, of a run and of an answer, as frozen dataclasses.

The comment above a field is its help text on the command line. Derived values are properties.
`validate()` checks across fields; `from_dict` reads what `dataclasses.asdict` wrote.
"""

from nanovlm.config.data import DataConfig, VideoConfig
from nanovlm.config.dual import ContrastiveConfig, DualConfig, TextConfig
from nanovlm.config.fields import differences, from_dict, pick, read_weights
from nanovlm.config.masked import MaskedConfig
from nanovlm.config.model import (
    DecoderConfig,
    FusionConfig,
    MoEConfig,
    ProjectorConfig,
    QuantizationConfig,
    RopeScalingConfig,
    TilingConfig,
    VisionConfig,
    VLMConfig,
)
from nanovlm.config.optim import OptimConfig, ParamRule
from nanovlm.config.post import AdapterConfig, DistillConfig, GroupConfig, PPOConfig, PreferenceConfig
from nanovlm.config.run import EvalConfig, InitConfig, ParallelConfig, TrainConfig
from nanovlm.config.sampling import SamplingConfig

__all__ = [
    "AdapterConfig",
    "ContrastiveConfig",
    "DataConfig",
    "DecoderConfig",
    "DistillConfig",
    "DualConfig",
    "EvalConfig",
    "FusionConfig",
    "GroupConfig",
    "InitConfig",
    "MaskedConfig",
    "MoEConfig",
    "OptimConfig",
    "PPOConfig",
    "ParallelConfig",
    "ParamRule",
    "PreferenceConfig",
    "ProjectorConfig",
    "QuantizationConfig",
    "RopeScalingConfig",
    "SamplingConfig",
    "TextConfig",
    "TilingConfig",
    "TrainConfig",
    "VLMConfig",
    "VideoConfig",
    "VisionConfig",
    "differences",
    "from_dict",
    "pick",
    "read_weights",
]
