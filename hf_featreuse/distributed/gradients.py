"""Send only the gradients of the parameters that train in a step, under DistributedDataParallel.

DDP sums every bucket of gradients over the ranks, including the parts that hold only zeros because their parameters
are not trained. Every rank knows these before the forward (pytorch/pytorch#90171 asks DDP for a way to declare them).
Here a communication hook, DDP's own extension point, sums only the active slices of each bucket.

DDP must keep its search for unused parameters: only then does it leave the `grad` of an inactive parameter `None`.
With `find_unused_parameters=False` it would write a zero gradient there, with which an optimizer moves the weight.

Source: hooks of DDP, `torch.nn.parallel.DistributedDataParallel.register_comm_hook`.
"""

# No postponed annotations: DDP compares the annotations of a hook with its own classes.
import torch
import torch.distributed as dist
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from hf_featreuse.distributed.agreement import check_ranks_agree
from hf_featreuse.errors import BlockError, ConfigurationError, StepError
from hf_featreuse.method.feature_reuse import FeatureReuse
from hf_featreuse.method.schedule import StepPlan


def reduce_active_gradients(ddp_model: DistributedDataParallel, reuse: FeatureReuse) -> bool:
    """Let the ranks exchange, in each step of feature reuse, only the gradients of its active parameters.

    Gradients are bit-identical to those of plain DDP. [`FeatureReuseTrainer`] calls this itself. In your own loop call
    it once on every rank, after wrapping and before the first backward. If called again, it follows the `reuse` that
    was passed last.

    Args:
        ddp_model (`DistributedDataParallel`): wraps `reuse.model`, with `find_unused_parameters=True`.
        reuse (`FeatureReuse`): blocks and schedule; backwards outside its steps exchange all gradients.

    Returns:
        `bool`: `False` if the model already has another communication hook, such as one that compresses: it stays, and
        all gradients are sent through it.

    Raises:
        ConfigurationError: `ddp_model` is not a `DistributedDataParallel`, has a static graph or does not look for
            unused parameters; or the ranks differ in blocks, schedule or options, which all of them raise.
        BlockError: it wraps another model, or some of its parameters were frozen when it was wrapped.
        StepError: a step is open; in a backward, an inactive parameter got a gradient nevertheless.

    Source: communication hooks, `torch.nn.parallel.DistributedDataParallel.register_comm_hook`.

    Example:
        >>> import tempfile, torch
        >>> from torch.nn.parallel import DistributedDataParallel
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import FeatureReuse, FeatureReuseSchedule, find_residual_blocks, reduce_active_gradients
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8,
        ...                    image_size=8, patch_size=4)
        >>> model = ViTForImageClassification(config)
        >>> blocks = find_residual_blocks(model)
        >>> reuse = FeatureReuse(model, blocks, FeatureReuseSchedule(len(blocks), seed=0))
        >>> store = torch.distributed.FileStore(tempfile.mktemp(), 1)
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> ddp_model = DistributedDataParallel(model, find_unused_parameters=True)
        >>> reduce_active_gradients(ddp_model, reuse)
        True
        >>> with reuse.step(0) as plan:
        ...     ddp_model(torch.ones(2, 3, 8, 8), labels=torch.tensor([0, 1])).loss.backward()
        >>> all(p.grad is None for index in plan.dropped for p in blocks[index].module.parameters())
        True
        >>> torch.distributed.destroy_process_group()
    """
    _check(ddp_model, reuse)
    group = ddp_model.process_group
    assert group is not None
    check_ranks_agree(reuse, group)
    for _, state in ddp_model._comm_hooks:
        if isinstance(state, _ActiveGradients):
            state.follow(reuse)
            return True
    if ddp_model._get_ddp_logging_data().get("comm_hook"):
        return False
    ddp_model.register_comm_hook(_ActiveGradients(reuse, group), _reduce_active_slices)
    return True


def check_ddp_options(*, static_graph: bool | None, find_unused_parameters: bool | None) -> None:
    """Raise `ConfigurationError` unless DDP can run graphs that change from step to step.

    Args:
        static_graph (`bool`, *optional*): DDP's option; `None` if it is unset.
        find_unused_parameters (`bool`, *optional*): the same.

    Example:
        >>> from hf_featreuse.distributed import check_ddp_options
        >>> check_ddp_options(static_graph=False, find_unused_parameters=True)
    """
    if static_graph:
        raise ConfigurationError(
            "`static_graph=True` promises DDP that every step uses the same parameters, but feature reuse trains "
            "different ones from step to step; DDP would stop with an error or lose gradients. Leave "
            "`ddp_static_graph` of the training arguments, or `static_graph` of `DistributedDataParallelKwargs` or "
            "`DistributedDataParallel`, unset."
        )
    if find_unused_parameters is False:
        raise ConfigurationError(
            "`find_unused_parameters=False` promises DDP that every parameter gets a gradient in every step, but "
            "feature reuse trains only some of them; DDP would stop with an error. Leave "
            "`ddp_find_unused_parameters` of the training arguments unset, or pass `find_unused_parameters=True` to "
            "`DistributedDataParallelKwargs` or `DistributedDataParallel`."
        )


def _check(ddp_model: DistributedDataParallel, reuse: FeatureReuse) -> None:
    if not isinstance(ddp_model, DistributedDataParallel):
        raise ConfigurationError(
            f"`ddp_model` is a {type(ddp_model).__name__}, not a DistributedDataParallel. Pass what "
            "`accelerator.prepare(model)` or `DistributedDataParallel(model, find_unused_parameters=True)` returns."
        )
    check_ddp_options(static_graph=ddp_model.static_graph, find_unused_parameters=ddp_model.find_unused_parameters)
    if reuse.current_plan is not None:
        raise StepError(
            "`reduce_active_gradients` was called inside a step. Call it once, before the first step of training."
        )
    if ddp_model.module is not reuse.model:
        raise BlockError(
            f"`ddp_model` wraps another {type(ddp_model.module).__name__} than `reuse.model`. Pass the wrapper of "
            "the model that was passed to `FeatureReuse`."
        )
    # DDP permanently ignores parameters that required no gradient when it wrapped the model.
    known = ddp_model._get_ddp_logging_data()["num_parameter_tensors"]
    trainable = sum(parameter.requires_grad for parameter in ddp_model.parameters())
    if known != trainable:
        raise BlockError(
            f"{trainable} parameters require gradients, but {known} did when DDP wrapped the model, and it "
            "synchronizes no others. Wrap the model outside of `reuse.step`, when all parameters that are to train "
            "require gradients."
        )


class _ActiveGradients:
    """State of the hook: the parameters that are active in the open step."""

    def __init__(self, reuse: FeatureReuse, group: dist.ProcessGroup) -> None:
        self.group = group
        self.follow(reuse)

    def follow(self, reuse: FeatureReuse) -> None:
        self.reuse = reuse
        self._plan: StepPlan | None = None
        self._active: set[int] = set()

    def is_active(self, parameter: torch.Tensor) -> bool:
        """Return whether a parameter may change in the open step; outside of steps every one may."""
        plan = self.reuse.current_plan
        if plan is None:
            return True
        if plan is not self._plan:
            self._plan, self._active = plan, {id(p) for p in self.reuse.active_parameters(plan)}
        return id(parameter) in self._active


def _reduce_active_slices(
    state: _ActiveGradients,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> Future[torch.Tensor]:
    """Average the active slices of a bucket over the ranks; the others stay zero. This is the hook."""
    buffer = bucket.buffer()
    slices = _active_slices(state, bucket)
    if not slices:
        done: Future[torch.Tensor] = Future()
        done.set_result(buffer)
        return done
    # A single slice is summed in place, several are packed into one message.
    flat = slices[0] if len(slices) == 1 else torch.cat(slices)
    flat.mul_(1 / state.group.size())
    work = dist.all_reduce(flat, group=state.group, async_op=True)
    assert work is not None

    def unpack(summed: Future) -> torch.Tensor:
        summed.value()  # Raises what went wrong.
        if len(slices) > 1:
            for part, mean in zip(slices, flat.split([part.numel() for part in slices]), strict=True):
                part.copy_(mean)
        return buffer

    return work.get_future().then(unpack)


def _active_slices(
    state: _ActiveGradients,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> list[torch.Tensor]:
    """Return the parts of a bucket's flat buffer that hold active gradients, with neighbors merged."""
    buffer = bucket.buffer()
    ranges: list[list[int]] = []
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        if not state.is_active(parameter):
            _check_has_no_gradient(state, parameter)
            continue
        start = int(gradient.storage_offset() - buffer.storage_offset())
        if ranges and ranges[-1][1] == start:
            ranges[-1][1] += gradient.numel()
        else:
            ranges.append([start, start + gradient.numel()])
    return [buffer[start:end] for start, end in ranges]


def _check_has_no_gradient(state: _ActiveGradients, parameter: torch.Tensor) -> None:
    """Raise `StepError` if an inactive parameter got a gradient, which would stay on this rank."""
    if parameter.grad is not None:
        name = next(name for name, other in state.reuse.model.named_parameters() if other is parameter)
        raise StepError(
            f"`{name}` does not train in this step but got a gradient from the loss, which would change it "
            "differently on each rank. Keep weights of dropped or frozen blocks out of the loss, for instance out of "
            "a penalty on all weights."
        )
