"""The index of a sharded checkpoint is a pickle: only its known parts are read, and code in it is not run."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from tiny_models import build

from hf_featreuse import CheckpointError
from hf_featreuse.checkpoints.completeness import checkpoint_fault, last_whole_checkpoint, resolve_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint folder whose model and optimizer torch wrote in its sharded form."""
    folder = tmp_path / "checkpoint-3"
    model = build("vit")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, 32, 32)).logits.sum().backward()
    optimizer.step()
    state = {"model": model.bfloat16().state_dict(), "optimizer": optimizer.state_dict(), "count": torch.ones(2).int()}
    distributed_checkpoint.save(state, checkpoint_id=folder / "shards", no_dist=True)
    (folder / "trainer_state.json").write_text('{"global_step": 3, "train_batch_size": 4}', encoding="utf-8")
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torch_writes_is_read(checkpoint: Path) -> None:
    assert checkpoint_fault(checkpoint) is None


class Harmful:
    """Unpickles as a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_code_in_it_is_refused_and_not_run(checkpoint: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (checkpoint / "shards" / ".metadata").write_bytes(pickle.dumps(Harmful(os.mkdir, str(ran))))
    assert "names posix.mkdir" in checkpoint_fault(checkpoint)
    for read in (
        lambda: last_whole_checkpoint(tmp_path),
        lambda: resolve_checkpoint(str(checkpoint), str(tmp_path)),
        lambda: resolve_checkpoint(str(checkpoint.rename(tmp_path / "downloaded")), str(tmp_path)),
    ):
        with pytest.raises(CheckpointError, match=r"names posix\.mkdir.*could run code"):
            read()
    assert not ran.exists()


@pytest.mark.parametrize("place", ["pytorch_model_fsdp_0", "optimizer_0", "other", "deep/er", ".", "linked"])
@pytest.mark.parametrize("name", [".metadata", ".METADATA", "__0.metadata"])
def test_an_index_without_shards_next_to_it_is_checked(name: str, place: str, tmp_path: Path) -> None:
    folder, ran = tmp_path / "checkpoint-3", tmp_path / "ran"
    target = tmp_path / "elsewhere" if place == "linked" else folder / place
    folder.mkdir()
    target.mkdir(parents=True, exist_ok=True)
    if place == "linked":
        (folder / "pytorch_model_fsdp_0").symlink_to(target)
    (folder / "trainer_state.json").write_text('{"global_step": 3, "train_batch_size": 4}', encoding="utf-8")
    (folder / "loop").symlink_to(folder)
    (target / name).write_bytes(pickle.dumps(Harmful(os.mkdir, str(ran))))
    assert "could run code" in checkpoint_fault(folder)
    assert not ran.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_value_in_a_shard_that_could_run_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """torch unpickles every value in a shard that is not a tensor, such as a learning rate."""
    state = {"lr": Harmful(os.mkdir, str(tmp_path / "ran"))}
    distributed_checkpoint.save(state, checkpoint_id=checkpoint / "more", no_dist=True)
    assert "holds under 'lr' a value that is damaged or could run code" in checkpoint_fault(checkpoint)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    ["os.system", "os", "dataclass", "Metadata.__init__"],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_nothing_is_reached_through_the_module_of_the_records(name: str, checkpoint: Path) -> None:
    module = "torch.distributed.checkpoint.metadata"
    text = [f"\x8c{chr(len(part))}{part}".encode("latin-1") for part in (module, name)]
    (checkpoint / "shards" / ".metadata").write_bytes(b"\x80\x04" + b"".join(text) + b"\x93.")
    assert "could run code" in checkpoint_fault(checkpoint)
