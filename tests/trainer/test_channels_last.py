"""Channels last: chosen by device and model, kept by activations and gradients, and resumed bitwise."""

from pathlib import Path

import pytest
import torch
from tiny_models import build, examples
from torch import nn
from training_runs import config, train

from hf_featreuse import ConfigurationError, FeatureReuseTrainer
from hf_featreuse.method.memory_format import is_convolutional, set_memory_format

LAST, CPU, CUDA = torch.channels_last, torch.device("cpu"), torch.device("cuda")


def is_last(model: nn.Module) -> bool:
    """Whether all two-dimensional kernels lie channels last."""
    kernels = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    return all(kernel.is_contiguous(memory_format=LAST) for kernel in kernels if kernel.shape[-1] > 1)


@pytest.mark.parametrize(("name", "expected"), [("vit", False), ("swin", False), ("convnext", True), ("resnet", True)])
def test_by_default_convolutional_models_on_a_gpu(name, expected):
    model = build(name)
    assert is_convolutional(model) == expected
    assert not set_memory_format(model, None, CPU, in_shards=False) and not is_last(model)
    assert not set_memory_format(model, None, CUDA, in_shards=True)
    assert not set_memory_format(model, False, CUDA, in_shards=False) and not is_last(model)
    assert set_memory_format(model, None, CUDA, in_shards=False) == expected == is_last(model)


def test_shards_are_refused_before_anything_changes():
    model = build("convnext")
    with pytest.raises(ConfigurationError, match=r"`channels_last=True` does not work with FSDP2"):
        set_memory_format(model, True, CPU, in_shards=True)
    assert not is_last(model)


def run(folder: Path, name: str, resume: str | None = None, **options) -> FeatureReuseTrainer:
    arguments = config(folder, **{"max_steps": 6, "logging_steps": 2, "save_steps": 3, **options})
    trainer = FeatureReuseTrainer(build(name), arguments, train_dataset=examples(16))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_activations_and_gradients_keep_the_format(tmp_path, granularity):
    model, found = build("convnext"), []

    def note(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if module.training and len(args[0]) > 1:
            found.append(output.is_contiguous(memory_format=LAST))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    arguments = config(tmp_path, channels_last=True, max_steps=4, drop_granularity=granularity, save_strategy="no")
    train(FeatureReuseTrainer(model, arguments, train_dataset=examples(16)))
    assert len(found) > 10 and all(found) and is_last(model)


@pytest.mark.parametrize("name", ["convnext", "resnet"])
def test_numbers_are_those_of_the_other_format_and_resuming_is_bitwise(tmp_path, name):
    options = {"optim": "sgd", "save_strategy": "steps"}
    plain = run(tmp_path / "plain", name, **options)
    whole = run(tmp_path / "whole", name, channels_last=True, **options)
    for first, second in zip(plain.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = run(tmp_path / "resumed", name, checkpoint, channels_last=True, **options)
    assert is_last(resumed.model)
    for (key, first), second in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), key
