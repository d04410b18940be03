"""What a checkpoint holds besides Trainer's own files: the sums behind the logs, and where its plans came from.

transformers 5.23 keeps these sums in memory alone, so the first `loss` after a resume is another one. One small JSON
file a rank is written before `trainer_state.json`, which closes a checkpoint: cut short, it is no JSON any more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESUME_STATE_NAME = "resume_state.json"
# Files that a checkpoint cannot be resumed exactly without.
_NEEDED = {".safetensors", ".pt", ".pth", ".bin", ".distcp"}
# Resuming does not read it, and a checkpoint from the Hub comes without it: it may hold a token.
_SPARE = "training_args.bin"


def write_resume_state(folder: str | Path, state: dict[str, Any], rank: int = 0, ranks: int = 1) -> None:
    """Write the state of one rank, and the names of the files that the checkpoint has by now.

    Args:
        folder (`str` or `Path`): the checkpoint folder.
        state (`dict`): values that JSON holds exactly: numbers, strings, lists, dictionaries with string keys.
        rank (`int`, defaults to 0): of this process.
        ranks (`int`, defaults to 1): number of processes; with more than one each writes its own file.

    Example:
        >>> import tempfile
        >>> from hf_featreuse.checkpoints.resume_state import read_resume_state, write_resume_state
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_resume_state(folder, {"loss": 0.1})
        ...     read_resume_state(folder)["loss"]
        0.1
    """
    folder = Path(folder)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in _NEEDED)
    _path(folder, rank, ranks).write_text(json.dumps({**state, "files": files}), encoding="utf-8")


def read_resume_state(folder: str | Path, rank: int = 0, ranks: int = 1) -> dict[str, Any] | None:
    """The state of one rank, as [`write_resume_state`] wrote it; `None` where the checkpoint has none for it."""
    path = _path(Path(folder), rank, ranks)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def resume_state_fault(folder: Path) -> str | None:
    """Say which of these files is cut short, or which file they name is missing; `None` where all is well."""
    for path in sorted(folder.glob(f"{Path(RESUME_STATE_NAME).stem}*.json")):
        try:
            files = json.loads(path.read_text(encoding="utf-8"))["files"]
        except ValueError:
            return f"{path.name} is cut short"
        missing = [name for name in files if name != _SPARE and not (folder / name).is_file()]
        if missing:
            return f"{missing[0]} is missing"
    return None


def _path(folder: Path, rank: int, ranks: int) -> Path:
    name = Path(RESUME_STATE_NAME)
    return folder / (name.name if ranks == 1 else f"{name.stem}_{rank}{name.suffix}")
