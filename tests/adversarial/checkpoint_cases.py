"""Ways to damage a checkpoint, by name, each with the verdict that is right.

A case changes the folder of step 2; that of step 1 stays complete. Verdicts: `skipped` (step 1 is used with a warning,
and step 2 is refused if it is named), `accepted`, `unverified` (accepted with a warning), `refused` (only `train()`,
which knows the model, can tell).
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tiny_models import build
from transformers.trainer_pt_utils import safe_globals

from hf_featreuse.checkpoints.resume_state import write_resume_state
from hf_featreuse.recipe.weight_average import AVERAGE_FILE

Damage = Callable[[Path], None]
RESUME, TRAINER = "resume_state.json", "trainer_state.json"
WEIGHTS, TORCH = "model.safetensors", ("optimizer.pt", "scheduler.pt", "rng_state.pth")
FILES = (WEIGHTS, *TORCH, TRAINER, RESUME)
CASES: dict[str, tuple[str, Damage]] = {}
# The path on which harmful pickles would leave a trace.
TRACE = Path("trace-of-a-pickle")


class Harmful:
    """Unpickles as a call that creates a folder."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(TRACE),)


def add(name: str, verdict: str, damage: Damage) -> None:
    assert name not in CASES
    CASES[name] = verdict, damage


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    path.write_bytes(edit(path.read_bytes()))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    content = edit(content) or content
    path.write_text(json.dumps(content))


def sign(folder: Path) -> None:
    """Record digests of the changed files, as someone who forges a checkpoint would."""
    state = json.loads((folder / RESUME).read_text())
    left = {name: value for name, value in state.items() if name not in ("files", "digest", "trainer_state")}
    write_resume_state(folder, left)


def signed(damage: Damage) -> Damage:
    def run(folder: Path) -> None:
        damage(folder)
        sign(folder)

    return run


def older(folder: Path) -> None:
    """A checkpoint as an older version wrote it, without digests."""
    edit_json(folder / RESUME, lambda s: {k: v for k, v in s.items() if k not in ("digest", "trainer_state", "step")})
    edit_json(folder / RESUME, lambda s: {**s, "files": list(s["files"])})


def saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def a_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("notes.txt", "hello")
    return stream.getvalue()


def middle(content: bytes, new: bytes) -> bytes:
    return content[: len(content) // 2] + new + content[len(content) // 2 + len(new) :]


# Bytes

BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "first half": lambda b: b[: len(b) // 2],
    "last byte lost": lambda b: b[:-2] if b.endswith(b"}\n") else b[:-1],
    "a byte more": lambda b: b + b"x",
    "zeros": lambda b: bytes(len(b)),
    "second half zeros": lambda b: b[: len(b) // 2] + bytes(len(b) - len(b) // 2),
    "a byte flipped": lambda b: middle(b, bytes([b[len(b) // 2] ^ 1])),
    "a block overwritten": lambda b: middle(b, b"\xff" * min(512, len(b) // 4)),
}
for file in FILES:
    for kind, edit in BYTES.items():
        add(f"{file}: {kind}", "skipped", lambda f, file=file, edit=edit: change(f / file, edit))
    add(f"{file}: of step 1", "skipped", lambda f, file=file: shutil.copy(f.parent / "checkpoint-1" / file, f / file))
    add(f"{file}: of another run", "skipped", lambda f, file=file: shutil.copy(f.parent / "other" / file, f / file))
    if file != RESUME:
        add(f"{file}: missing", "skipped", lambda f, file=file: (f / file).unlink())
add("trainer_state.json: end of the line lost", "accepted", lambda f: change(f / TRAINER, bytes.rstrip))
for kind in ("empty", "first half", "last byte lost", "zeros"):
    for file in ("config.json", "training_args.bin"):
        add(f"{file}: {kind}", "skipped", lambda f, file=file, kind=kind: change(f / file, BYTES[kind]))

# Kinds of content, in forged checkpoints

CONTENTS: dict[str, Callable[[], bytes]] = {
    "list": lambda: saved([1, 2]),
    "number": lambda: saved(3),
    "nothing": lambda: saved(None),
    "tensor": lambda: saved(torch.ones(2)),
    "numbered": lambda: saved({1: torch.ones(2)}),
    "harmful": lambda: saved({"state": Harmful()}),
    "harmful without a zip": lambda: pickle.dumps(Harmful()),
    "JSON": lambda: b'{"a": 1}',
    "zip of text": a_zip,
    "safetensors": lambda: safetensors.torch.save({"a": torch.ones(2)}),
    "noise": lambda: bytes(range(256)) * 8,
}
for file in TORCH:
    for kind, make in CONTENTS.items():
        add(f"{file}: {kind}", "skipped", signed(lambda f, file=file, make=make: (f / file).write_bytes(make())))
    add(f"{file}: empty mapping", "refused" if file == "scheduler.pt" else "skipped",
        signed(lambda f, file=file: (f / file).write_bytes(saved({}))))  # fmt: skip
for kind in ("list", "harmful", "harmful without a zip", "JSON", "zip of text", "noise"):
    make = CONTENTS[kind]
    add(f"{WEIGHTS}: {kind}", "skipped", signed(lambda f, make=make: (f / WEIGHTS).write_bytes(make())))

    def pickled(folder: Path, make: Callable[[], bytes] = make) -> None:
        (folder / WEIGHTS).unlink()
        (folder / "pytorch_model.bin").write_bytes(make())

    add(f"pytorch_model.bin: {kind}", "skipped", signed(pickled))
    add(f"pytorch_model.bin: {kind}, unsigned", "skipped", pickled)
for name, make in {
    "list": lambda: b"[]",
    "number": lambda: b"5",
    "text": lambda: b'"x"',
    "null": lambda: b"null",
    "deep": lambda: b"[" * 200_000,
    "deep object": lambda: b'{"a":' * 100_000,
    "not UTF-8": lambda: b"\xff\xfe{}",
    "harmful": lambda: pickle.dumps(Harmful()),
    "zip": a_zip,
}.items():
    for file in (TRAINER, RESUME, "config.json", "adapter_config.json", "model.safetensors.index.json"):
        add(f"{file}: {name}", "skipped", lambda f, file=file, make=make: (f / file).write_bytes(make()))

# Values in the JSON files


def entry(file: str, key: str, value: Any) -> Damage:
    """Another value, in a checkpoint without digests."""

    def run(folder: Path) -> None:
        older(folder)
        edit_json(folder / file, lambda content: {**content, key: value})

    return run


for key, values in {
    "global_step": ("2", -1, 1.5, True, None, [2]),
    "train_batch_size": (None, "4", [4], True),
    "log_history": ({}, [1], "x"),
    "epoch": ("x", []),
    "stateful_callbacks": ([], "x"),
    "best_metric": ("x", {}),
    "of_another_version": (1,),
}.items():
    for value in values:
        add(f"{TRAINER}: {key}={value!r}", "skipped", entry(TRAINER, key, value))
for key, values in {
    "loss": ("x", None, []),
    "total_loss": ("x",),
    "last_logged": (None, "x"),
    "at_epoch_end": (3,),
    "due": (3, None),
    "files": (3, None, {"a": 1}, [1], ["../../x"], ["/etc/passwd"]),
    "plans": (
        5,
        [],
        {},
        {"schedule": 3, "blocks": []},
        {"schedule": {"num_blocks": 1, "drop_rate": 7}, "blocks": ["a"]},
    ),
}.items():
    for value in values:
        add(f"{RESUME}: {key}={value!r}", "skipped", entry(RESUME, key, value))

# Faults that only the model reveals


def edit_torch(file: str, edit: Callable[[Any], Any]) -> Damage:
    def run(folder: Path) -> None:
        with safe_globals():
            content = copy.deepcopy(torch.load(folder / file, weights_only=True))
        torch.save(edit(content) or content, folder / file)

    return signed(run)


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def run(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        edit(tensors)
        safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return signed(run)


def moments(value: Callable[[torch.Tensor], Any]) -> Damage:
    def edit(content: dict[str, Any]) -> None:
        for state in content["state"].values():
            state["exp_avg"] = value(state["exp_avg"])

    return edit_torch("optimizer.pt", edit)


def newer_plans(folder: Path) -> None:
    older(folder)
    edit_json(folder / RESUME, lambda state: state["plans"].update(version="9.0", more=1))


lose_moments = edit_torch("optimizer.pt", lambda c: [state.pop("exp_avg") for state in c["state"].values()] and None)
for name, damage in {
    "moments of a larger shape": moments(lambda t: torch.zeros(3, *t.shape)),
    "moments of one number": moments(lambda t: torch.zeros(1)),
    "moments without a shape": moments(lambda t: torch.zeros(())),
    "moments that are words": moments(lambda t: "x"),
    "moments that are missing": lose_moments,
    "a group less": edit_torch("optimizer.pt", lambda c: c["param_groups"].pop() and c["state"].clear()),
    "betas in words": edit_torch("optimizer.pt", lambda c: c["param_groups"][0].update(betas="x")),
    "steps in words": edit_torch("scheduler.pt", lambda c: c.update(last_epoch="x")),
    "a scheduler's method replaced": edit_torch("scheduler.pt", lambda c: c.update(step=1)),
    "base rates missing": edit_torch("scheduler.pt", lambda c: c.pop("base_lrs") and None),
    "a weight missing": edit_weights(lambda t: t.pop(sorted(t)[0])),
    "a weight more": edit_weights(lambda t: t.update(more=torch.ones(2))),
    "a weight of another shape": edit_weights(lambda t: t.update({sorted(t)[0]: torch.ones(5, 7)})),
    "sums by kind of another form": entry(RESUME, "by_kind", 5),
    "plans of a newer version": newer_plans,
}.items():  # fmt: skip
    add(name, "refused", damage)
add("moments of no parameter", "skipped", edit_torch("optimizer.pt", lambda c: c["state"].update({999: {}})))
add("a random state that would read outside its memory", "skipped",
    edit_torch("rng_state.pth", lambda c: {**c, "numpy": (*c["numpy"][:2], 10**6, *c["numpy"][3:])}))  # fmt: skip

# Folders, links, and files of others


def shards(folder: Path, lose: str | None = None, **options: Any) -> None:
    build("vit").save_pretrained(folder, max_shard_size="10KB", **options)
    (folder / WEIGHTS).unlink(missing_ok=True)
    if lose == "index":
        (folder / f"{WEIGHTS}.index.json").unlink()
    elif lose == "shard":
        next(folder.glob("model-*.safetensors")).unlink()


def link_files(folder: Path) -> None:
    """Like the cache of the Hub, where each file is a link to a blob."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)


def index_of_shards(place: str, name: str) -> Damage:
    def run(folder: Path) -> None:
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / name).write_bytes(pickle.dumps(Harmful()))

    return run


for place in ("pytorch_model_fsdp_0", "optimizer_0", "any/where", "."):
    for name in (".metadata", ".Metadata", "__0.metadata"):
        add(f"harmful {place}/{name}", "skipped", index_of_shards(place, name))
for file in (AVERAGE_FILE, "scaler.pt", "adapter_model.safetensors"):
    content = saved({}) if file.endswith(".pt") else safetensors.torch.save({"a": torch.ones(2)})
    add(f"{file} added", "skipped", lambda f, file=file, content=content: (f / file).write_bytes(content))
add("a pipe", "skipped", lambda f: os.mkfifo(f / "optimizer_0.bin"))
add("a pipe for the state", "skipped", lambda f: ((f / TRAINER).unlink(), os.mkfifo(f / TRAINER)))
add("a folder for the weights", "skipped", lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()))
add("a link to nothing", "skipped", lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to("nothing")))
add("a link to itself", "skipped", lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to(WEIGHTS)))
add("nothing in it", "skipped", lambda f: (shutil.rmtree(f), f.mkdir()))
add("a file for the folder", "skipped", lambda f: (shutil.rmtree(f), f.write_text("x")))
add("shards without an index", "skipped", lambda f: shards(f, "index"))
add("an index without a shard", "skipped", lambda f: shards(f, "shard"))
add("an index that names files elsewhere", "skipped", lambda f: (shards(f), edit_json(
    f / f"{WEIGHTS}.index.json", lambda s: {"weight_map": {"a": "../checkpoint-1/model.safetensors"}}
)))  # fmt: skip
add("no weights", "skipped", lambda f: (f / WEIGHTS).unlink())
add("untouched", "accepted", lambda f: None)
add("of an older version", "accepted", older)
add("without our file", "accepted", lambda f: (f / RESUME).unlink())
add("without training_args.bin", "accepted", lambda f: (f / "training_args.bin").unlink())
add("without config.json", "accepted", lambda f: (f / "config.json").unlink())
add("files that are links", "accepted", link_files)
add("a folder that links to itself", "accepted", lambda f: (f / "loop").symlink_to(f))
add(
    "notes and pictures added",
    "accepted",
    lambda f: ((f / "notes.txt").write_text("x"), (f / "a.png").write_bytes(b"x")),
)
add(
    "a pickle that nothing reads",
    "accepted",
    lambda f: (f / "custom_checkpoint_0.pkl").write_bytes(pickle.dumps(Harmful())),
)
add(
    "paths that moved",
    "accepted",
    lambda f: edit_json(f / TRAINER, lambda s: {**s, "best_model_checkpoint": "/moved"}),
)
add("weights saved again in shards", "unverified", shards)
add("weights saved again by torch.save", "unverified", lambda f: (
    torch.save(build("vit").state_dict(), f / "pytorch_model.bin"), (f / WEIGHTS).unlink()
))  # fmt: skip
