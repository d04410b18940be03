"""Layer-wise learning rates: the groups of each architecture, what they do in a step, resume, and refusals."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import build, examples
from training_runs import config, options, same_bits, state_of, train, without_times
from transformers import TrainingArguments
from transformers.optimization import Adafactor

from hf_featreuse import (
    CheckpointError,
    ConfigurationError,
    FeatureReuseConfig,
    FeatureReuseTrainer,
    find_residual_blocks,
    layer_decay_groups,
)

RATE, DECAY = 1e-2, 0.5
# The rule of timm's `param_groups_layer_decay` for a ViT of four blocks, written out: embeddings are layer 0, block i
# is layer i + 1, the final norm belongs to the last block, the head is layer 5; scale 0.5 ** (5 - layer).
OF_A_VIT = {
    "vit.embeddings.": 0.03125,
    "vit.layers.0.": 0.0625,
    "vit.layers.1.": 0.125,
    "vit.layers.2.": 0.25,
    "vit.layers.3.": 0.5,
    "vit.layernorm.": 0.5,
    "classifier.": 1.0,
}


def trainer_of(tmp_path, model=None, **changed):
    args = config(tmp_path, weight_decay=0.1, **{"layer_decay": DECAY, **changed})
    return FeatureReuseTrainer(model or build("vit"), args, train_dataset=examples(), eval_dataset=examples(8))


def groups_by_name(model, optimizer):
    """Learning rate and weight decay of each parameter, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def is_decayed(name):
    return not name.endswith("bias") and "layernorm" not in name


def test_the_groups_of_a_vit_are_those_of_timms_rule(tmp_path):
    trainer = trainer_of(tmp_path, head_lr_multiplier=3.0)
    found = groups_by_name(trainer.model, trainer.create_optimizer())
    expected = {}
    for name, _ in trainer.model.named_parameters():
        (prefix,) = [prefix for prefix in OF_A_VIT if name.startswith(prefix)]
        scale = OF_A_VIT[prefix] * (3.0 if OF_A_VIT[prefix] == 1 else 1.0)
        expected[name] = (pytest.approx(RATE * scale), 0.1 if is_decayed(name) else 0.0)
    assert found == expected
    assert len(trainer.optimizer.param_groups) == 2 * 6, "with and without weight decay, of six layers"


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("resnet", {"resnet.embedder.": 0,
                    "resnet.encoder.stages.0.layers.0.": 1, "resnet.encoder.stages.0.layers.1.": 2,
                    # Not a residual block that was found: between the second and the third, it belongs to the third.
                    "resnet.encoder.stages.1.layers.0.": 3, "resnet.encoder.stages.1.layers.1.": 3,
                    "resnet.encoder.stages.1.layers.2.": 4, "classifier.": 5}),
        ("swin", {"swin.embeddings.": 0, "swin.encoder.layers.0.blocks.0.": 1, "swin.encoder.layers.0.blocks.1.": 2,
                  "swin.encoder.layers.0.downsample.": 3, "swin.encoder.layers.1.blocks.0.": 3,
                  "swin.encoder.layers.1.blocks.1.": 4, "swin.layernorm.": 4, "classifier.": 5}),
    ],
)  # fmt: skip
def test_what_lies_between_two_blocks_belongs_to_the_one_after_it(architecture, expected):
    model = build(architecture)
    groups = layer_decay_groups(model, find_residual_blocks(model), learning_rate=1.0, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, rate in found.items():
        (prefix,) = [prefix for prefix in expected if name.startswith(prefix)]
        assert rate == 0.5 ** (5 - expected[prefix]), name


def test_a_step_moves_each_layer_by_its_own_rate(tmp_path):
    """With SGD the update is the rate times the gradient, so a step of each layer is a share of the plain step."""
    moved = {}
    for decay in (None, DECAY):
        trainer = trainer_of(tmp_path, layer_decay=decay, drop_rate=0.0, optim="sgd", max_steps=1, max_grad_norm=0)
        before = {name: p.detach().double() for name, p in trainer.model.named_parameters()}
        trainer.train()
        moved[decay] = {name: p.detach().double() - before[name] for name, p in trainer.model.named_parameters()}
    for prefix, scale in OF_A_VIT.items():
        for name in (name for name in moved[None] if name.startswith(prefix) and "mask_token" not in name):
            torch.testing.assert_close(moved[DECAY][name], scale * moved[None][name], rtol=1e-3, atol=1e-7)


def test_warm_up_and_log_are_those_of_the_learning_rate_passed(tmp_path):
    trainer = train(trainer_of(tmp_path, max_steps=4, warmup_steps=2, lr_scheduler_type="constant_with_warmup"))
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([0.0, RATE / 2, RATE, RATE])
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {RATE * scale for scale in OF_A_VIT.values()}


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "rmsprop", "adagrad"])
def test_any_optimizer_of_trainer_has_the_groups(tmp_path, optim):
    trainer = train(trainer_of(tmp_path, optim=optim, max_steps=2))
    found = groups_by_name(trainer.model, trainer.optimizer)
    rates = {prefix: {rate for name, (rate, _) in found.items() if name.startswith(prefix)} for prefix in OF_A_VIT}
    first = rates["classifier."]
    assert all(rates[prefix] == {rate * scale for rate in first} for prefix, scale in OF_A_VIT.items())


def test_an_optimizer_that_chooses_its_own_rate_is_refused(tmp_path):
    # Adafactor with relative steps has no learning rate.
    trainer = trainer_of(tmp_path)
    trainer.optimizer_cls_and_kwargs = (Adafactor, {"lr": None, "relative_step": True})
    with pytest.raises(ConfigurationError, match="computes its own"):
        trainer.create_optimizer()


def test_frozen_blocks_and_adapters_keep_their_numbers(tmp_path):
    model = build("vit")
    model.vit.layers[3].requires_grad_(False)
    trainer = trainer_of(tmp_path, model)
    found = groups_by_name(model, trainer.create_optimizer())
    assert not [name for name in found if name.startswith("vit.layers.3.")]
    assert found["vit.layers.2.mlp.fc1.weight"] == (RATE * 0.25, 0.1)

    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    trainer = train(
        trainer_of(tmp_path, get_peft_model(build("vit"), lora), max_steps=2, lr_scheduler_type="constant")
    )
    found = groups_by_name(trainer.model, trainer.optimizer)
    assert len(found) == 2 * 4 + 2
    for name, (rate, _) in found.items():
        layer = int(name.split("layers.")[1][0]) + 1 if "lora_" in name else 5
        assert rate == RATE * DECAY ** (5 - layer), name


def test_layers_are_all_blocks_whichever_are_targeted(tmp_path):
    trainer = trainer_of(tmp_path, target_blocks=["layers.0", "layers.1"], max_steps=1, lr_scheduler_type="constant")
    found = groups_by_name(trainer.model, train(trainer).optimizer)
    assert found["vit.layers.3.mlp.fc1.weight"] == (RATE * 0.5, 0.1)


def test_resume_is_exact_and_a_changed_decay_is_reported(tmp_path, caplog):
    saved = {"save_strategy": "steps", "save_steps": 2, "head_lr_multiplier": 2.0}

    def run(folder, checkpoint=None, **changed):
        trainer = trainer_of(folder, **{**saved, **changed})
        trainer.train(resume_from_checkpoint=checkpoint)
        return state_of(trainer.model), without_times(trainer.state.log_history)

    whole, checkpoint = run(tmp_path / "whole"), str(tmp_path / "whole" / "checkpoint-4")
    assert same_bits(run(tmp_path / "resumed", checkpoint), whole)
    with caplog.at_level("WARNING", logger="hf_featreuse"):
        changed = run(tmp_path / "changed", checkpoint, layer_decay=0.75)
    assert "`layer_decay=0.75` (before: 0.5)" in caplog.text
    assert same_bits(changed[0], whole[0]), "the optimizer of the checkpoint is restored"
    with pytest.raises(CheckpointError, match=r"groups of.*`layer_decay`"):
        run(tmp_path / "without", checkpoint, layer_decay=None, head_lr_multiplier=1.0)


def test_without_the_options_nothing_changes(tmp_path):
    plain = FeatureReuseTrainer(build("vit"), TrainingArguments(**options(tmp_path)), train_dataset=examples())
    assert len(plain.create_optimizer().param_groups) == 2
    assert "lr_scale" not in plain.optimizer.param_groups[0]


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"layer_decay": 0.0}, r"`layer_decay=0\.0`"),
        ({"layer_decay": 1.5}, r"`layer_decay=1\.5`"),
        ({"layer_decay": True}, "`layer_decay=True`"),
        ({"head_lr_multiplier": 0}, "`head_lr_multiplier=0`"),
        ({"head_lr_multiplier": float("inf")}, "`head_lr_multiplier=inf`"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, changed, match):
    with pytest.raises(ConfigurationError, match=match):
        FeatureReuseConfig(**options(tmp_path), **changed)


def test_a_passed_optimizer_and_foreign_parameters_are_refused(tmp_path):
    model = build("vit")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="one was passed"):
        FeatureReuseTrainer(model, config(tmp_path, layer_decay=0.5), optimizers=(optimizer, None))
    blocks, foreign = find_residual_blocks(model), [{"params": [torch.nn.Parameter(torch.ones(2))]}]
    with pytest.raises(ConfigurationError, match=r"shape \(2,\).*not one of the model"):
        layer_decay_groups(model, blocks, foreign, learning_rate=0.1, layer_decay=0.5)
    with pytest.raises(ConfigurationError, match="none were found in"):
        layer_decay_groups(model, [], learning_rate=0.1, layer_decay=0.5)
