"""Train residual image classifiers whose layers reuse features (arXiv 2411.09475)."""

from hf_featreuse.blocks import ResidualBlock, find_residual_blocks, trainable_blocks
from hf_featreuse.cost import StepCosts, measure_step_costs
from hf_featreuse.engine import FeatureReuse
from hf_featreuse.errors import FeatureReuseError
from hf_featreuse.freezing import train_only
from hf_featreuse.schedule import FeatureReuseSchedule, StepKind, StepPlan
from hf_featreuse.skipping import skip_blocks

__version__ = "0.1.0.dev0"
