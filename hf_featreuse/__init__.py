"""Train residual image classifiers whose layers reuse features (arXiv 2411.09475).

Each public name is imported when it is first used, so that a command that needs none of them starts at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_featreuse.checkpoints.failures import check_finite
    from hf_featreuse.distributed.gradients import reduce_active_gradients
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
    from hf_featreuse.hub.folders import push_folder
    from hf_featreuse.inspection.inspecting import inspect_model
    from hf_featreuse.inspection.report import BlockReport, ModelReport
    from hf_featreuse.method.blocks import ResidualBlock, find_residual_blocks, trainable_blocks
    from hf_featreuse.method.compiling import compile_blocks
    from hf_featreuse.method.cost import BlockCost, StepCosts, measure_step_costs
    from hf_featreuse.method.feature_reuse import FeatureReuse
    from hf_featreuse.method.freezing import train_only
    from hf_featreuse.method.schedule import FeatureReuseSchedule, StepKind, StepPlan
    from hf_featreuse.method.skipping import skip_blocks
    from hf_featreuse.pruning.measuring import accuracy_on
    from hf_featreuse.pruning.removing import prune_blocks
    from hf_featreuse.pruning.selecting import Removal, rank_removals
    from hf_featreuse.recipe.mixing import BatchMixer, mix_losses
    from hf_featreuse.recipe.weight_average import WeightAverage
    from hf_featreuse.trainer.arguments import FeatureReuseArguments, FeatureReuseConfig
    from hf_featreuse.trainer.layer_decay import layer_decay_groups
    from hf_featreuse.trainer.resumable import ResumableTrainer
    from hf_featreuse.trainer.trainer import FeatureReuseTrainer

__version__ = "0.1.0.dev0"

# Where each name is; a test compares this with the imports for type checkers above.
_PLACES = {
    "checkpoints.failures": ("check_finite",),
    "distributed.gradients": ("reduce_active_gradients",),
    "errors": (
        *("BadImageError", "BlockError", "CheckpointError", "ConfigurationError", "DataError", "FeatureReuseError"),
        *("HubError", "IncompatibleVersionError", "StepError"),
    ),
    "hub.folders": ("push_folder",),
    "inspection.inspecting": ("inspect_model",),
    "inspection.report": ("BlockReport", "ModelReport"),
    "method.blocks": ("ResidualBlock", "find_residual_blocks", "trainable_blocks"),
    "method.compiling": ("compile_blocks",),
    "method.cost": ("BlockCost", "StepCosts", "measure_step_costs"),
    "method.feature_reuse": ("FeatureReuse",),
    "method.freezing": ("train_only",),
    "method.schedule": ("FeatureReuseSchedule", "StepKind", "StepPlan"),
    "method.skipping": ("skip_blocks",),
    "pruning.measuring": ("accuracy_on",),
    "pruning.removing": ("prune_blocks",),
    "pruning.selecting": ("Removal", "rank_removals"),
    "recipe.mixing": ("BatchMixer", "mix_losses"),
    "recipe.weight_average": ("WeightAverage",),
    "trainer.arguments": ("FeatureReuseArguments", "FeatureReuseConfig"),
    "trainer.layer_decay": ("layer_decay_groups",),
    "trainer.resumable": ("ResumableTrainer",),
    "trainer.trainer": ("FeatureReuseTrainer",),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

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
    "ResumableTrainer",
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
    "layer_decay_groups",
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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    except Exception as error:
        from hf_featreuse.errors import torchvision_misfit

        raise (torchvision_misfit(error) or error) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
