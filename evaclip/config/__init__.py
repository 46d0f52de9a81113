"""Every option of a run, typed, with its documentation and default.

This package decides what a valid configuration is; ``config_file`` turns YAML and command-line text into one. It
imports no torch, so a mistake is reported before anything heavy starts. A field's docstring is its help text.
"""

from __future__ import annotations

from evaclip.config.data import (
    IMAGE_KEYS,
    AugmentConfig,
    DataConfig,
    Dataset,
    EvalConfig,
    EvalDataset,
    RetrievalDataset,
    ShardSource,
    Source,
    SyntheticSource,
    ValidationLossDataset,
    ZeroShotDataset,
)
from evaclip.config.model import (
    ImageTowerConfig,
    InfoNceConfig,
    Loss,
    LossConfig,
    ModelConfig,
    SigmoidConfig,
    TextTowerConfig,
)
from evaclip.config.run import (
    AdamWConfig,
    CheckpointConfig,
    DeepSpeedEngineConfig,
    Engine,
    InitConfig,
    LambConfig,
    LogConfig,
    Optim,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TorchEngineConfig,
    TowerOptimConfig,
    TrainConfig,
    WandbConfig,
    WeightFormat,
)

__all__ = [
    "IMAGE_KEYS",
    "AdamWConfig",
    "AugmentConfig",
    "CheckpointConfig",
    "DataConfig",
    "Dataset",
    "DeepSpeedEngineConfig",
    "Engine",
    "EvalConfig",
    "EvalDataset",
    "ImageTowerConfig",
    "InfoNceConfig",
    "InitConfig",
    "LambConfig",
    "LogConfig",
    "Loss",
    "LossConfig",
    "ModelConfig",
    "Optim",
    "OptimConfig",
    "RetrievalDataset",
    "RunConfig",
    "ScheduleConfig",
    "ShardSource",
    "SigmoidConfig",
    "Source",
    "SyntheticSource",
    "TextTowerConfig",
    "TorchEngineConfig",
    "TowerOptimConfig",
    "TrainConfig",
    "ValidationLossDataset",
    "WandbConfig",
    "WeightFormat",
    "ZeroShotDataset",
]
