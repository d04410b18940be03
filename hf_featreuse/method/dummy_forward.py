"""Run a model once to examine it, without side effects."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedConfig, PreTrainedModel

from hf_featreuse.errors import BlockError

# Side of the dummy image, in pixels, for models whose config has no image size (ResNet): five halvings leave 2x2.
_DEFAULT_IMAGE_SIZE = 64
_DUMMY_SEQUENCE_LENGTH = 8
_ATTRIBUTES_OF_MODULE = frozenset(vars(nn.Module()))


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode with gradients enabled; then restore modes, attributes, buffers and random states."""
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    # Caches that a model fills in eval mode, such as LeViT's of attention biases, would keep this graph, and may
    # already hold an old one.
    caches = [
        value
        for found in attributes
        for name, value in found.items()
        if isinstance(value, dict) and name not in _ATTRIBUTES_OF_MODULE
    ]
    cached = [dict(cache) for cache in caches]
    registered = [dict(module._buffers) for module in modules]
    contents = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
    device = model_device(model)
    forked = [device] if device.type == "cuda" else []
    autocast_device = "cpu" if device.type == "meta" else device.type
    states = random.getstate(), np.random.get_state()
    try:
        with (
            torch.random.fork_rng(forked),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(autocast_device, enabled=False),
        ):
            for module in modules:
                # accelerate wraps the forward of a prepared model in autocast.
                if "_original_forward" in module.__dict__:
                    module.__dict__["forward"] = module.__dict__["_original_forward"]
            for cache in caches:
                if any(isinstance(value, torch.Tensor) and value.requires_grad for value in cache.values()):
                    cache.clear()
            model.eval()
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, attribute, buffers in zip(modules, attributes, registered, strict=True):
            # Swin, for example, permanently shrinks its window for a small input.
            module.__dict__.clear()
            module.__dict__.update(attribute)
            module._buffers.clear()
            module._buffers.update(buffers)
        for cache, content in zip(caches, cached, strict=True):
            cache.clear()
            cache.update(content)
        with torch.no_grad():
            for buffer, version, content in contents:
                if buffer._version != version:
                    # Quantization observers change shapes.
                    if buffer.shape != content.shape:
                        buffer.resize_(content.shape)
                    buffer.copy_(content)


def check_not_compiled(model: nn.Module, name: str = "") -> None:
    """Raise `BlockError` if the model, called `name` in the error, or a part of it is compiled."""
    for part, module in model.named_modules(prefix=name):
        if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
            raise BlockError(
                f"{f'`{part}`' if part else 'The model'} is compiled already, which hides residual blocks. Pass the "
                "model as it was before `torch.compile` or `.compile()`, and compile its blocks with "
                "`torch_compile=True` or `compile_blocks`."
            )


def check_not_inference(model: nn.Module) -> None:
    """Raise `BlockError` if the model was built inside `torch.inference_mode()`, so that it cannot be trained."""
    held = (*model.named_parameters(), *model.named_buffers())
    name = next((name for name, tensor in held if tensor.is_inference()), None)
    if name is not None:
        raise BlockError(
            f"`{name}` of {type(model).__name__} is an inference tensor, which autograd cannot use. Build or load the "
            "model, and move it to its device, outside `torch.inference_mode()`."
        )


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the first parameter; the CPU for a model without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def own_drop_path_rate(model: nn.Module) -> float:
    """Return the highest rate of the architecture's own drop path layers, 0 without any; Swin has 0.1 by default."""
    layers = (module for module in model.modules() if type(module).__name__.endswith("DropPath"))
    rates = (getattr(layer, "drop_prob", None) for layer in layers)
    return max((rate for rate in rates if isinstance(rate, float)), default=0.0)


def model_inputs(model: nn.Module, inputs: Mapping[str, Any] | torch.Tensor | None) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of a forward, from a batch, a tensor or the config; without labels unless required."""
    if isinstance(inputs, torch.Tensor):
        return (_for_autograd(inputs),), {}
    batch = dummy_inputs(model) if inputs is None else inputs
    if not isinstance(batch, Mapping):
        raise BlockError(
            f"`inputs` is a {type(inputs).__name__}, not a batch. Pass a dictionary of tensors for the model's "
            "forward, or one tensor."
        )
    device, parameters = model_device(model), inspect.signature(model.forward).parameters
    moved = {
        key: _for_autograd(value.to(device)) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key not in ("labels", "label") or (key in parameters and parameters[key].default is inspect.Parameter.empty)
    }
    if "use_cache" in parameters:
        # A cache of keys keeps the inputs of the blocks, and grows when they run again.
        moved.setdefault("use_cache", False)
    return (), moved


def _for_autograd(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy if it was made inside `torch.inference_mode()`, which no graph can hold."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor


def takes_dummy_inputs(model: nn.Module) -> bool:
    """Return whether `dummy_inputs` can make a batch for the model, and the model runs on it."""
    try:
        args, kwargs = model_inputs(model, None)
        with undisturbed(model), torch.no_grad():
            model(*args, **kwargs)
    except Exception:
        return False
    return True


def _dummy_input_name(pretrained: PreTrainedModel) -> str | None:
    """Return the name of the dummy input: images if the model takes them, as Perceiver does among other inputs."""
    if pretrained.main_input_name in ("pixel_values", "input_ids"):
        return pretrained.main_input_name
    return "pixel_values" if "pixel_values" in inspect.signature(pretrained.forward).parameters else None


def _pretrained(model: nn.Module) -> PreTrainedModel | None:
    """Return the transformers model that this model is or wraps."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def dummy_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a batch of one, all zeros, of the size in the model's config."""
    pretrained = _pretrained(model)
    if pretrained is None:
        raise BlockError(
            f"{type(model).__name__} is not a transformers model, so it has no config to make a dummy batch from. "
            "Pass a small batch as `inputs`."
        )
    device, name = model_device(model), _dummy_input_name(pretrained)
    if name == "pixel_values":
        channels, *size = _image_shape(pretrained)
        return {name: torch.zeros(1, channels, *size, device=device, dtype=pretrained.dtype)}
    if name == "input_ids":
        return {name: torch.zeros(1, _DUMMY_SEQUENCE_LENGTH, device=device, dtype=torch.long)}
    raise BlockError(
        f"{type(pretrained).__name__} takes `{pretrained.main_input_name}`, for which no dummy batch can be made. "
        "Pass a small batch as `inputs`."
    )


def _image_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Return the channels, height and width of the images that a model takes."""
    config = model.config
    if config.model_type == "timm_wrapper":
        # timm stores the size next to the model; arguments of its constructor take precedence.
        given, (channels, *size) = config.model_args or {}, cast(Any, model).timm_model.pretrained_cfg["input_size"]
        return (given.get("in_chans", channels), *_height_and_width(given.get("img_size") or size))
    size = _lookup(config, "image_size") or _DEFAULT_IMAGE_SIZE
    return (_lookup(config, "num_channels") or 3, *_height_and_width(size))


def _height_and_width(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return (size, size)
    height, width = list(size.values())[:2] if isinstance(size, dict) else tuple(size)[-2:]
    return (height, width)


def _lookup(config: PreTrainedConfig, key: str) -> Any:
    """Return the value of a key in the config, else in its vision or backbone config, else `None`."""
    configs = [config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)]
    return next((value for part in configs if (value := getattr(part, key, None)) is not None), None)
