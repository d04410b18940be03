"""The example of LoRA as a user calls it, on a tiny local checkpoint and the handwritten digits."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import tiny_checkpoints
from transformers import AutoModelForImageClassification, pipeline

from hf_featreuse import CheckpointError

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_lora.py"
SHORT = ["--max_steps", "4", "--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu", "true"]
FEW = ["--max_train_samples", "64", "--max_eval_samples", "32", "--learning_rate", "0.01", "--save_steps", "2"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_lora", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path: Path, request: pytest.FixtureRequest) -> list[str]:
    # A checkpoint for three classes: the head is replaced.
    base = tiny_checkpoints.save(tmp_path / "base", labels=["a", "b", "c"], model_type=request.param)
    return ["--model_name_or_path", base, "--output_dir", str(tmp_path / "out"), *SHORT, *FEW]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["vit", "convnext"], indirect=True)
def test_it_leaves_an_adapter_and_a_merged_model(arguments: list[str], example: ModuleType, tmp_path: Path) -> None:
    example.run([*arguments, "--merged_dir", str(tmp_path / "merged")])
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert 0 <= results["eval_accuracy"] <= 1
    tensors = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all("lora_" in name or "classifier" in name for name in tensors)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A LORA adapter" in card and "local weights on scikit-learn digits" in card and str(tmp_path) not in card
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 10
    assert not any("lora" in name for name in merged.state_dict())
    assert pipeline("image-classification", model=str(tmp_path / "merged"))
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    example.run([*arguments, "--resume_from_checkpoint", "last"])
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("arguments", ["vit"], indirect=True)
def test_an_error_is_one_line(
    arguments: list[str], example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["finetune_lora.py", *arguments, "--resume_from_checkpoint", str(tmp_path / "no")]
    )
    with pytest.raises(SystemExit, match=r"error: .*is not a directory") as caught:
        example.main()
    assert isinstance(caught.value.__context__, CheckpointError)
