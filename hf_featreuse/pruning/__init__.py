"""Remove residual blocks from a model, and get an ordinary, shallower model of the same class."""

from hf_featreuse.pruning.measuring import accuracy_on
from hf_featreuse.pruning.removing import prune_blocks
from hf_featreuse.pruning.selecting import Removal, rank_removals

__all__ = ["Removal", "accuracy_on", "prune_blocks", "rank_removals"]
