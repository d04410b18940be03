"""The index of a sharded checkpoint is a pickle: its known parts are read, and code in it is not run."""

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
    (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
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
    for read in (
        lambda: checkpoint_fault(checkpoint),
        lambda: last_whole_checkpoint(tmp_path),
        lambda: resolve_checkpoint(str(checkpoint), str(tmp_path)),
        lambda: resolve_checkpoint(str(checkpoint.rename(tmp_path / "downloaded")), str(tmp_path)),
    ):
        with pytest.raises(CheckpointError, match=r"names posix\.mkdir.*could run code"):
            read()
    assert not ran.exists()


@pytest.mark.parametrize(
    "name",
    ["os.system", "os", "dataclass", "Metadata.__init__"],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_nothing_is_reached_through_the_module_of_the_records(name: str, checkpoint: Path) -> None:
    module = "torch.distributed.checkpoint.metadata"
    text = [f"\x8c{chr(len(part))}{part}".encode("latin-1") for part in (module, name)]
    (checkpoint / "shards" / ".metadata").write_bytes(b"\x80\x04" + b"".join(text) + b"\x93.")
    with pytest.raises(CheckpointError, match="could run code"):
        checkpoint_fault(checkpoint)
