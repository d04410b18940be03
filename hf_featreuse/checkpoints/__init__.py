"""Checkpoints: strict weights, whether one is complete, what else it holds, changed settings, and failures."""
