"""Train residual image classifiers whose layers reuse features (arXiv 2411.09475)."""

__version__ = "0.1.0.dev0"
