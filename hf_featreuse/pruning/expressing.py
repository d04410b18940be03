"""Find the configuration of a model without some of its blocks, if there is one.

There is no table of architectures; the options that set the depth are tried. A twin of the model is built on the meta
device with a smaller value, and its layers are compared, one by one, with the layers that remain. A layer that would
differ at its new place (Swin shifts the windows of every second one) is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_featreuse.errors import BlockError
from hf_featreuse.method.blocks import ResidualBlock
from hf_featreuse.text import joined

# Names under which configurations of transformers hold a number of layers, or a list with one per stage.
_DEPTH_OPTIONS = (
    "num_hidden_layers", "n_layer", "num_self_attends_per_block", "depths", "depth", "n_attn_blocks",
    "stage_num_blocks", "num_block_repeats",
)  # fmt: skip
# What backbones derive from the number of layers; classifiers do not read it.
_DERIVED = ("stage_names", "out_features", "out_indices")
_DIFFER_WITHOUT_HARM = ("layer_idx", "training")

Signature = dict[str, Any]


@dataclass(frozen=True)
class DepthOption:
    """A number of layers in a configuration: `vision_config.num_hidden_layers`, `depths[2]`."""

    part: str
    name: str
    index: int | None

    def __str__(self) -> str:
        name = f"{self.part}.{self.name}" if self.part else self.name
        return name if self.index is None else f"{name}[{self.index}]"

    def read(self, options: Mapping[str, Any]) -> int:
        value = (options[self.part] if self.part else options)[self.name]
        return value if self.index is None else value[self.index]

    def write(self, options: dict[str, Any], value: int) -> None:
        part = options[self.part] if self.part else options
        if self.index is None:
            part[self.name] = value
            for derived in _DERIVED:
                part.pop(derived, None)
        else:
            part[self.name] = [*part[self.name][: self.index], value, *part[self.name][self.index + 1 :]]


class Depth:
    """The lists of layers of a model, and the options of its configuration that set their lengths.

    Args:
        model (`PreTrainedModel`): the model to make shallower.
        blocks (`list[ResidualBlock]`): its residual blocks.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[ResidualBlock]) -> None:
        self.model_class, self.config = type(model), model.config
        modules = dict(model.named_modules())
        names = dict.fromkeys(block.name.rpartition(".")[0] for block in blocks)
        self.layers = {name: [child for child, _ in modules[name].named_children()] for name in names}
        self._options = _depth_options(model.config.to_dict())
        self._twins: dict[tuple[tuple[DepthOption, int], ...], dict[str, list[Signature]] | str] = {}
        self._values: dict[tuple[str, int], tuple[DepthOption, int] | str] = {}

    def config_without(self, names: Sequence[str]) -> PreTrainedConfig:
        """Return the configuration of the model without these blocks; raise `BlockError` if there is none."""
        found = self._settings(names)
        if isinstance(found, str):
            raise BlockError(
                f"The configuration of {self.model_class.__name__} cannot express the model without "
                f"{joined(names)}: {found}{self._hint(names)}"
            )
        return _changed(self.config, found)

    def can_express(self, names: Sequence[str]) -> bool:
        """Return whether a configuration without these blocks exists."""
        return not isinstance(self._settings(names), str)

    def partners(self, names: Sequence[str]) -> list[str]:
        """Return the blocks of the same lists that, removed too, would make the removal possible."""
        lists = dict.fromkeys(name.rpartition(".")[0] for name in names)
        others = [f"{name}.{child}" for name in lists for child in self.layers[name]]
        return [name for name in others if name not in names and self.can_express([*names, name])]

    def _hint(self, names: Sequence[str]) -> str:
        partners = self.partners(names)
        return f" It can if {joined(partners, 'or')} is removed as well." if partners else ""

    def _settings(self, names: Sequence[str]) -> dict[DepthOption, int] | str:
        """Return the values of the options that remove these blocks, or the reason why there are none."""
        settings: dict[DepthOption, int] = {}
        rest = {name: list(children) for name, children in self.layers.items()}
        for name in names:
            parent, _, child = name.rpartition(".")
            rest[parent].remove(child)
        for parent, children in rest.items():
            if len(children) == len(self.layers[parent]):
                continue
            found = self._value(parent, len(children))
            if isinstance(found, str):
                return found
            option, value = found
            if settings.setdefault(option, value) != value:
                return f"`{option}` sets the lengths of several lists, including {parent}."
            twin = self._twin({option: value})
            assert not isinstance(twin, str)
            reason = self._compare(parent, children, twin[parent])
            if reason:
                return reason
        together = self._twin(settings)
        if isinstance(together, str):
            return together
        wrong = next((parent for parent in rest if len(together[parent]) != len(rest[parent])), None)
        return settings if wrong is None else f"`{next(iter(settings))}` changes the length of {wrong} too."

    def _value(self, parent: str, length: int) -> tuple[DepthOption, int] | str:
        """Return the option and the value that give a list of layers this length, or the reason why there is none."""
        if (parent, length) not in self._values:
            self._values[parent, length] = self._find_value(parent, length)
        return self._values[parent, length]

    def _find_value(self, parent: str, length: int) -> tuple[DepthOption, int] | str:
        options = self.config.to_dict()
        setting, failures = [], []
        for option in self._options:
            twin = self._twin({option: option.read(options) - 1})
            if isinstance(twin, str):
                failures.append(twin)
            elif len(twin[parent]) != len(self.layers[parent]):
                setting.append(option)
        if not setting:
            return " ".join([f"none of its options sets the length of {parent}.", *failures])
        if len(setting) > 1:
            return f"several options, {joined([str(option) for option in setting])}, share the layers of {parent}."
        now = setting[0].read(options)
        likely = now - len(self.layers[parent]) + length
        for value in sorted(range(now), key=lambda value: (value != likely, -value)):
            twin = self._twin({setting[0]: value})
            if not isinstance(twin, str) and len(twin[parent]) == length:
                return setting[0], value
        return f"no value of `{setting[0]}` leaves {length} of the {len(self.layers[parent])} layers of {parent}."

    def _compare(self, parent: str, children: Sequence[str], twin: Sequence[Signature]) -> str | None:
        """Return why a remaining layer would differ in the shallower model; `None` if none would."""
        whole = self._twin({})
        if isinstance(whole, str):
            return whole
        for child, there in zip(children, twin, strict=True):
            here = whole[parent][self.layers[parent].index(child)]
            differing = next((key for key in {**here, **there} if here.get(key) != there.get(key)), None)
            if differing is not None:
                return (
                    f"{parent}.{child} would have {differing} {there.get(differing, 'nowhere')} at its new place, not "
                    f"{here.get(differing, 'nowhere')}."
                )
        return None

    def _twin(self, settings: Mapping[DepthOption, int]) -> dict[str, list[Signature]] | str:
        """Return the layers' signatures in a model of the changed configuration, or why it cannot be built."""
        key = tuple(settings.items())
        if key not in self._twins:
            self._twins[key] = self._build_twin(settings)
        return self._twins[key]

    def _build_twin(self, settings: Mapping[DepthOption, int]) -> dict[str, list[Signature]] | str:
        try:
            config = _changed(self.config, settings)
            with torch.random.fork_rng([]), torch.device("meta"):
                modules = dict(self.model_class(config).named_modules())
        except Exception as error:
            listed = ", ".join(f"{option}={value}" for option, value in settings.items())
            reason = " ".join(str(error).split()).rstrip(".")
            return f"{self.model_class.__name__} cannot be built with {listed}: {type(error).__name__}: {reason}."
        return {name: [_signature(child) for child in modules[name].children()] for name in self.layers}


def _depth_options(options: Mapping[str, Any]) -> list[DepthOption]:
    """Return every option that holds a number of layers, of a configuration and those inside it."""
    parts = {"": options, **{name: value for name, value in options.items() if isinstance(value, dict)}}
    found = []
    for part, inner in parts.items():
        for name in _DEPTH_OPTIONS:
            value = inner.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                found.append(DepthOption(part, name, None))
            elif isinstance(value, list | tuple) and all(isinstance(entry, int) for entry in value):
                found += [DepthOption(part, name, index) for index in range(len(value))]
    return found


def _changed(config: PreTrainedConfig, settings: Mapping[DepthOption, int]) -> PreTrainedConfig:
    """Return a copy of a configuration with changed numbers of layers."""
    if not settings:
        return copy.deepcopy(config)
    options = config.to_dict()
    for option, value in settings.items():
        option.write(options, value)
    changed = type(config).from_dict(options)
    # Chosen per session; configurations do not save it.
    changed._attn_implementation = config._attn_implementation
    return changed


def _signature(layer: nn.Module) -> Signature:
    """Return what defines a layer except its weights: classes, shapes and plain attributes of its modules.

    Dropout and drop path are left out: their rates follow from the depth, and they do nothing in inference.
    """
    signature: Signature = {}
    for name, module in layer.named_modules():
        if "drop" in name or isinstance(module, nn.Identity):
            continue
        signature[f"class of {name}" if name else "class"] = type(module).__name__
        for key, value in vars(module).items():
            if _is_plain(value) and key[0] != "_" and "drop" not in key and key not in _DIFFER_WITHOUT_HARM:
                signature[f"{name}.{key}" if name else key] = value
    signature |= {f"shape of {name}": tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    return signature


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
