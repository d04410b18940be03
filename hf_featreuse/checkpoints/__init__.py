"""Checkpoints: strict weights, whether one is complete, what else it holds, changed settings, and failures."""

from hf_featreuse.checkpoints.changed_settings import PlanSource, check_plans, check_scaling

__all__ = ["PlanSource", "check_plans", "check_scaling"]
