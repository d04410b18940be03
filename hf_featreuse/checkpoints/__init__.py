"""Checkpoints: strict loading, completeness, the state that resuming needs, changed settings, and failures."""

from hf_featreuse.checkpoints.changed_settings import PlanSource, check_plans, check_scaling

__all__ = ["PlanSource", "check_plans", "check_scaling"]
