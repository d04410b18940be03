"""Compiled blocks keep their gradients when what trains changes, with every torch: a graph holds for what it was made.

torch before 2.13 may run a graph that was made for frozen weights with weights that train (pytorch/pytorch#139476).
"""

import copy

import pytest
import torch
from tiny_models import batch, build

from hf_featreuse import compile_blocks, find_residual_blocks, train_only


def gradients(model, blocks, trained) -> dict[str, torch.Tensor]:
    """Those of a step that trains some blocks only, or all that there is."""
    if trained is None:
        model(**batch()).loss.backward()
    else:
        with train_only(model, [blocks[index] for index in trained]):
            model(**batch()).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    "steps", [([0], [2], None, [1]), (None, [3], [0, 1], None)], ids=["frozen first", "all first"]
)
def test_a_graph_of_a_frozen_block_does_not_run_one_that_trains(steps):
    compiled = build("vit")
    eager = copy.deepcopy(compiled)
    blocks = find_residual_blocks(compiled)
    of_eager = find_residual_blocks(eager)
    # A backend that compiles backward.
    with compile_blocks(blocks, backend="aot_eager"):
        for trained in steps:
            found, wanted = gradients(compiled, blocks, trained), gradients(eager, of_eager, trained)
            assert found.keys() == wanted.keys(), trained
            torch.testing.assert_close(found, wanted)


def test_settings_of_torch_are_as_before():
    settings = torch._dynamo.config
    before = (settings.recompile_limit, settings.skip_tensor_guards_with_matching_dict_tags)
    with compile_blocks(find_residual_blocks(build("vit")), backend="eager"):
        pass
    assert (settings.recompile_limit, settings.skip_tensor_guards_with_matching_dict_tags) == before
