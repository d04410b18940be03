"""Training in several processes with DistributedDataParallel: what is sent, and that all ranks agree."""

from hf_featreuse.distributed.agreement import check_ranks_agree, tell_ranks_of_failure
from hf_featreuse.distributed.gradients import check_ddp_options, reduce_active_gradients
from hf_featreuse.distributed.launching import find_lone_launch

__all__ = [
    "check_ddp_options",
    "check_ranks_agree",
    "find_lone_launch",
    "reduce_active_gradients",
    "tell_ranks_of_failure",
]
