"""Models outside image classification: the same engine works with them, or reports why it does not."""

import pytest
import torch
from tiny_models import snapshot
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForSequenceClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)

from hf_featreuse import (
    BlockError,
    FeatureReuse,
    FeatureReuseConfig,
    FeatureReuseSchedule,
    FeatureReuseTrainer,
    StepKind,
    StepPlan,
    find_residual_blocks,
    measure_step_costs,
    skip_blocks,
    train_only,
)
from hf_featreuse.method.cost import flop_counter

_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SPEECH = {
    "d_model": 16,
    "encoder_layers": 3,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "vocab_size": 64,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "classifier_proj_size": 16,
    "num_labels": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
# Pre-norm text encoder, decoder-only language model, speech encoder; and the names of their blocks, by hand.
BLOCKS = {
    "roberta-prelayernorm": [f"roberta_prelayernorm.encoder.layer.{index}" for index in range(3)],
    "llama": [f"model.layers.{index}" for index in range(3)],
    "whisper": [f"encoder.layers.{index}" for index in range(3)],
}
each_model = pytest.mark.parametrize("name", BLOCKS)


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "bert":
        model = BertForSequenceClassification(BertConfig(**_TEXT, num_labels=3))
    elif name == "roberta-prelayernorm":
        model = RobertaPreLayerNormForSequenceClassification(RobertaPreLayerNormConfig(**_TEXT, num_labels=3))
    elif name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**_TEXT))
    else:
        model = WhisperForAudioClassification(WhisperConfig(**_SPEECH))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


def batch(name: str, size: int = 2) -> dict:
    """Small explicit inputs, without labels."""
    generator = torch.Generator().manual_seed(1)
    if name == "whisper":
        return {"input_features": torch.randn(size, 8, 40, generator=generator)}
    tokens = {"input_ids": torch.randint(3, 60, (size, 10), generator=generator)}
    # Trainer sets this in a training step too: no keys and values are kept.
    return {**tokens, "use_cache": False} if name == "llama" else tokens


def labeled(name: str, size: int = 2) -> dict:
    inputs = batch(name, size)
    return {**inputs, "labels": inputs["input_ids"] if name == "llama" else torch.arange(size) % 3}


@each_model
def test_blocks_are_found(name):
    model = build(name)
    before = snapshot(model)
    blocks = find_residual_blocks(model, batch(name))
    assert [block.name for block in blocks] == BLOCKS[name]
    assert all(block.exact and block.activation is None for block in blocks)
    assert snapshot(model) == before


def test_a_post_norm_model_has_no_exact_shortcut():
    # A layer of BERT is LayerNorm(x + f(x)): without f it would still normalize, so it is not its input.
    model = build("bert")
    with pytest.raises(BlockError, match="BertForSequenceClassification has no residual block that can be skipped"):
        find_residual_blocks(model, batch("bert"))


def test_speech_needs_explicit_inputs():
    with pytest.raises(BlockError, match="takes `input_features`, for which no dummy batch can be made"):
        find_residual_blocks(build("whisper"))


class Shortcut(nn.Module):
    def forward(self, stream, *args, **kwargs):
        return stream


@each_model
def test_skipping_equals_taking_the_blocks_out(name):
    model, reference = build(name), build(name)
    blocks = find_residual_blocks(model, batch(name))
    dropped = [blocks[0], blocks[2]]
    for block in dropped:
        reference.set_submodule(block.name, Shortcut())
    torch.manual_seed(5)
    expected = reference(**labeled(name))
    expected.loss.backward()
    torch.manual_seed(5)
    with skip_blocks(dropped):
        output = model(**labeled(name))
        output.loss.backward()
    assert torch.equal(output.logits, expected.logits)
    kept = dict(reference.named_parameters())
    for key, parameter in model.named_parameters():
        if key in kept and kept[key].grad is not None:
            torch.testing.assert_close(parameter.grad, kept[key].grad)
        else:
            assert parameter.grad is None


@each_model
def test_train_only_one_block(name):
    model = build(name)
    blocks = find_residual_blocks(model, batch(name))
    with train_only(model, blocks[1:2]):
        model(**labeled(name)).loss.backward()
    assert {key.startswith(f"{blocks[1].name}.") for key, p in model.named_parameters() if p.grad is not None} == {
        True
    }


@each_model
def test_costs_are_those_of_the_flop_counter(name):
    model = build(name).eval()
    blocks = find_residual_blocks(model, batch(name))
    costs = measure_step_costs(model, blocks, batch(name), train_trunk=False)
    plans = {StepKind.STOCHASTIC_DEPTH: skip_blocks(blocks[1:]), StepKind.MASKED_FREEZE: train_only(model, blocks[1:])}
    for kind, context in plans.items():
        with context, flop_counter() as counter:
            model(**batch(name)).logits.sum().backward()
        share = counter.get_total_flops() / costs.vanilla
        assert costs.share(StepPlan(kind, (1, 2))) == pytest.approx(share, rel=0.02)


def test_costs_with_a_cache_of_keys_and_values():
    model = build("llama")
    inputs = {**batch("llama"), "use_cache": True}
    measure_step_costs(model, find_residual_blocks(model, inputs), inputs)


@each_model
def test_the_engine_runs_alternating_steps(name):
    model = build(name)
    blocks = find_residual_blocks(model, batch(name))
    reuse = FeatureReuse(
        model,
        blocks,
        FeatureReuseSchedule(3, drop_rate=0.5, drop_rate_schedule="uniform", seed=0, stochastic_depth_steps=1),
    )
    optimizer = torch.optim.AdamW(model.parameters())
    kinds = []
    for step in range(4):
        with reuse.step(step) as plan:
            loss = model(**labeled(name)).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert loss.isfinite()
        kinds.append(plan.kind.value)
    assert kinds == ["stochastic_depth", "masked_freeze"] * 2


@pytest.mark.parametrize("name", ["roberta-prelayernorm", "llama", "whisper"])
def test_the_trainer_runs_alternating_steps(name, tmp_path):
    inputs = {key: value for key, value in labeled(name, 8).items() if key != "use_cache"}
    data = [{key: value[index] for key, value in inputs.items()} for index in range(8)]
    args = FeatureReuseConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        drop_rate=0.5,
        drop_rate_schedule="uniform",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        stochastic_depth_steps=1,
    )
    trainer = FeatureReuseTrainer(build(name), args, train_dataset=data)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [sorted(set(entry) & {"loss/stochastic_depth", "loss/masked_freeze"}) for entry in logs] == [
        ["loss/stochastic_depth"],
        ["loss/masked_freeze"],
    ] * 2
