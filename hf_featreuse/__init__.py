"""Train residual image classifiers whose layers reuse features (arXiv 2411.09475)."""

from hf_featreuse.recipe.weight_average import WeightAverage
from hf_featreuse.method.blocks import ResidualBlock, find_residual_blocks, trainable_blocks
from hf_featreuse.method.compiling import compile_blocks
from hf_featreuse.trainer.arguments import FeatureReuseArguments, FeatureReuseConfig
from hf_featreuse.method.cost import BlockCost, StepCosts, measure_step_costs
from hf_featreuse.distributed import reduce_active_gradients
from hf_featreuse.method.feature_reuse import FeatureReuse
from hf_featreuse.errors import (
    BadImageError,
    BlockError,
    CheckpointError,
    ConfigurationError,
    DataError,
    FeatureReuseError,
    HubError,
    IncompatibleVersionError,
    StepError,
)
from hf_featreuse.checkpoints.failures import check_finite
from hf_featreuse.method.freezing import train_only
from hf_featreuse.hub import push_folder
from hf_featreuse.inspection import BlockReport, ModelReport, inspect_model
from hf_featreuse.recipe.mixing import BatchMixer, mix_losses
from hf_featreuse.pruning import Removal, accuracy_on, prune_blocks, rank_removals
from hf_featreuse.method.schedule import FeatureReuseSchedule, StepKind, StepPlan
from hf_featreuse.method.skipping import skip_blocks
from hf_featreuse.trainer.trainer import FeatureReuseTrainer

__version__ = "0.1.0.dev0"

__all__ = [
    "BadImageError",
    "BatchMixer",
    "BlockCost",
    "BlockError",
    "BlockReport",
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "FeatureReuse",
    "FeatureReuseArguments",
    "FeatureReuseConfig",
    "FeatureReuseError",
    "FeatureReuseSchedule",
    "FeatureReuseTrainer",
    "HubError",
    "IncompatibleVersionError",
    "ModelReport",
    "Removal",
    "ResidualBlock",
    "StepCosts",
    "StepError",
    "StepKind",
    "StepPlan",
    "WeightAverage",
    "accuracy_on",
    "check_finite",
    "compile_blocks",
    "find_residual_blocks",
    "inspect_model",
    "measure_step_costs",
    "mix_losses",
    "prune_blocks",
    "push_folder",
    "rank_removals",
    "reduce_active_gradients",
    "skip_blocks",
    "train_only",
    "trainable_blocks",
]
