"""Frozen convolutions do not save their input, and compute the same."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from hf_featreuse import find_residual_blocks, train_only
from hf_featreuse.method.class_swap import set_class
from hf_featreuse.method.frozen_convolution import convolutions, input_free_class
from hf_featreuse.small_models import small_config

LAYERS = {
    "one dimension": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "stride": (nn.Conv2d(4, 6, 3, stride=2), (2, 4, 9, 8)),
    "depthwise": (nn.Conv2d(4, 4, 7, padding=3, groups=4), (2, 4, 9, 8)),
    "dilation, no bias": (nn.Conv2d(4, 6, 3, dilation=2, bias=False), (2, 4, 9, 8)),
    "three dimensions": (nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)), (2, 4, 3, 5, 5)),
}


def _run(layer, x, autocast):
    saved = []

    def keep(tensor):
        saved.append(tensor.shape)
        return tensor

    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
        output = layer(x)
    (gradient,) = torch.autograd.grad(output, x, torch.ones_like(output))
    return {"saved": saved, "output": output, "gradient": gradient}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_bit_identical_and_no_input_is_saved(name, autocast):
    layer, shape = LAYERS[name]
    layer.requires_grad_(False)
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    plain, plain_class = _run(layer, x, autocast), type(layer)
    set_class(layer, input_free_class(plain_class))
    lean = _run(layer, x, autocast)
    set_class(layer, plain_class)
    assert x.shape in plain["saved"]
    assert x.shape not in lean["saved"]
    assert torch.equal(lean["output"], plain["output"])
    assert torch.equal(lean["gradient"], plain["gradient"])
    assert lean["gradient"].dtype == torch.float32


def test_a_single_image_without_batch_dimension_takes_the_plain_path():
    layer = nn.Conv2d(4, 6, 3).requires_grad_(False)
    x = torch.randn(4, 9, 8, requires_grad=True)
    plain = _run(layer, x, False)
    set_class(layer, input_free_class(nn.Conv2d))
    assert torch.equal(_run(layer, x, False)["gradient"], plain["gradient"])


def test_the_memory_format_of_the_gradient_is_kept():
    layer = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    set_class(layer, input_free_class(nn.Conv2d))
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_a_weight_that_trains_after_all_gets_its_gradient():
    layer = nn.Conv2d(1, 1, 3)
    set_class(layer, input_free_class(nn.Conv2d))
    layer(torch.ones(1, 1, 3, 3)).sum().backward()
    assert layer.weight.grad is not None


def test_layers_with_other_padding_or_another_forward_do_not_change():
    class Own(nn.Conv2d):
        pass

    layers = [nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")]
    layers += [nn.Conv2d(1, 1, 3, padding="same"), Own(1, 1, 3), nn.ConvTranspose2d(1, 1, 3), nn.Linear(1, 1)]
    assert convolutions(layers) == layers[:1]


def _saved_inputs(loss):
    """The operations of Linear and convolution layers that keep their input, which only a weight gradient needs."""
    found, seen, rest = [], set(), [loss.grad_fn]
    while rest:
        node = rest.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        rest += [following for following, _ in node.next_functions]
        kept = {"AddmmBackward0": "_saved_mat1", "ConvolutionBackward0": "_saved_input"}.get(node.name())
        found += [node] if kept and getattr(node, kept) is not None else []
    return found


@pytest.mark.parametrize("model_type", ["vit", "convnext", "resnet", "swin"])
def test_a_masked_freeze_step_keeps_the_inputs_of_only_the_layers_that_train(model_type):
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(small_config(model_type, 32, num_labels=3)).train()
    blocks = find_residual_blocks(model)
    trained = blocks[len(blocks) // 2]
    weighted = [m for m in trained.module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    with train_only(model, [trained]):
        loss = model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss
        kept = len(_saved_inputs(loss))
    plain = len(_saved_inputs(model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss))
    assert 0 < kept <= len(weighted) < plain


def test_nothing_is_saved_below_the_lowest_block_that_trains():
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(small_config("vit", 32, num_labels=3)).train()
    blocks = find_residual_blocks(model)
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with train_only(model, blocks[-1:]), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stream = {}
        handle = blocks[-1].module.register_forward_pre_hook(lambda _, args: stream.update(count=len(saved)))
        model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1]))
        handle.remove()
    assert stream["count"] == 0 < len(saved)


def test_copies_made_inside_a_step_are_plain_and_train_again():
    model = AutoModelForImageClassification.from_config(small_config("convnext", 32, num_labels=3)).train()
    with train_only(model, find_residual_blocks(model)[:1]):
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (model, *copies):
        assert {type(m) for m in other.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
