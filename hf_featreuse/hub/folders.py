"""Select the files of a folder that belong on the Hub, and push an existing folder."""

from __future__ import annotations

import fnmatch
import json
import re
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from hf_featreuse.checkpoints.completeness import is_whole_safetensors
from hf_featreuse.errors import CheckpointError, ConfigurationError
from hf_featreuse.hub.averaged import save_averaged
from hf_featreuse.hub.card import build_model_card, has_processor
from hf_featreuse.hub.markdown import python_string
from hf_featreuse.hub.sending import CARD_FILE, Target, make_repository, send
from hf_featreuse.recipe.weight_average import AVERAGE_FILE
from hf_featreuse.text import first_sentence, flat, one_line, printable

logger = logging.get_logger(__name__)

# Never pushed. `training_args.bin` is a pickle of the training arguments, including the user's token.
# The options, the report of the evaluation and the predictions of a run hold paths and images of its data.
PRIVATE = ("training_args.bin", "run.yaml", "evaluation", "predictions.csv", "_*", ".*", "__pycache__")
# What only resuming needs.
FOR_RESUMING = (
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "resume_state*.json", "global_step*"),
    AVERAGE_FILE,
)
# Trials of a search, runs of trackers, and unfinished checkpoints of a killed process.
_ELSEWHERE = ("run-*", "unfinished-*")
_CHECKPOINTS = (f"{PREFIX_CHECKPOINT_DIR}-*", "last-checkpoint")
# One file or shards.
_WEIGHTS = ("model*.safetensors", SAFE_WEIGHTS_INDEX_NAME)
_REPOSITORY_LINE = re.compile(r'^repository = "(?:[^"\\\n]|\\.)*"$', re.MULTILINE)


def files_to_push(folder: str | Path, *, checkpoints: bool = False, for_resuming: bool = False) -> dict[str, Path]:
    """List the files of a run or checkpoint folder that belong on the Hub, by their path in the repository.

    Folders of the trials of a hyperparameter search, `run-<trial>`, do not. Links that leave the folder, or that point
    to a file that is never pushed, are skipped with a warning.

    Args:
        folder (`str` or `Path`): the folder.
        checkpoints (`bool`, defaults to `False`): include the folders `checkpoint-<step>`, with what resuming needs.
        for_resuming (`bool`, defaults to `False`): include optimizer, scheduler and random states of the folder
            itself.
    """
    root, found = Path(folder), {}
    real_root = root.resolve()
    for path in _walk(root, real_root, (real_root,)):
        parts = path.relative_to(root).parts
        in_checkpoint = any(_matches(part, _CHECKPOINTS) for part in parts[:-1])
        resumes = any(_matches(part, FOR_RESUMING) for part in parts)
        if checkpoints if in_checkpoint else for_resuming or not resumes:
            found["/".join(parts)] = path
    return found


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    checkpoints: bool = False,
    new_card: bool = False,
    message: str = "Upload model",
) -> str:
    """Push a finished run, or any folder that `save_pretrained` wrote, to a repository on the Hub.

    Everything is checked before anything is sent, and nothing in the folder changes. Optimizer states and other files
    for resuming are not sent unless `checkpoints` is set; `training_args.bin`, which holds the token that training
    used, is never sent. For a checkpoint of a run with `ema_decay` the averaged weights are pushed. The snippet on a
    card written by this package is changed to name the repository.

    Args:
        folder (`str` or `Path`): with a model or a PEFT adapter in safetensors, its configuration and a model card.
        repo_id (`str`): `"owner/name"`, or a name in your own namespace. It is created if missing.
        private (`bool`, *optional*): visibility of a new repository; by default the owner's setting.
        revision (`str`, *optional*): branch, created if missing; by default the main one.
        token (`str`, *optional*): by default `HF_TOKEN` or the stored one.
        checkpoints (`bool`, defaults to `False`): push the folders `checkpoint-<step>` too.
        new_card (`bool`, defaults to `False`): if the folder holds no card, push a short one made from its
            configuration, without details of training.
        message (`str`, defaults to `"Upload model"`): message of the commit.

    Returns:
        `str`: address of the commit.

    Raises:
        ConfigurationError: `folder` is not a directory, or holds no model or card; `repo_id` is not an id; or the
            folder holds an adapter with a separate average of its weights.
        CheckpointError: a weights file is cut short or missing, or the average is of another model.
        HubError: the push failed.

    Example:
        >>> from hf_featreuse.hub import push_folder
        >>> push_folder("no/such/folder", "ada/vit-digits")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        hf_featreuse.errors.ConfigurationError: `no/such/folder` is not a directory. Pass the `output_dir` of ...
    """
    folder = Path(folder)
    if not message.strip():
        raise ConfigurationError("`message` (--message) is empty. Pass a message for the commit.")
    card = check_folder_to_push(folder, repo_id, new_card=new_card)
    target = Target(repo_id, revision, private, token)
    api = HfApi(library_name="hf_featreuse")
    files: dict[str, Path | bytes] = {**files_to_push(folder, checkpoints=checkpoints)}
    _check_links(folder, set(files))
    if note := processor_note(folder):
        logger.warning(note)
    with tempfile.TemporaryDirectory() as averaged:
        if (folder / AVERAGE_FILE).is_file():
            files = {path: file for path, file in files.items() if not _matches(path, _WEIGHTS)}
            files |= {path.name: path for path in save_averaged(folder, averaged) if _matches(path.name, _WEIGHTS)}
        name = make_repository(api, target, folder)
        line = f"repository = {python_string(name)}"
        files[CARD_FILE] = _REPOSITORY_LINE.sub(lambda _: line, card, count=1).encode()
        return str(send(api, Target(name, revision, private, token), files, message, folder).commit_url)


def check_folder_to_push(folder: Path, repo_id: str, *, new_card: bool = False) -> str:
    """Check that a folder can be pushed to a repository, and return the text of its card."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigurationError(
            f"`{repo_id}` is not a repository id: {first_sentence(error)} Pass `owner/name`."
        ) from error
    if not folder.is_dir():
        raise ConfigurationError(
            f"`{folder}` is not a directory. Pass the `output_dir` of a run, or a folder that `save_pretrained` wrote."
        )
    _check_weights(folder)
    path = folder / CARD_FILE
    if path.is_file():
        try:
            return str(ModelCard.load(path))
        except Exception as error:  # The YAML parser and the checks of the metadata raise many classes.
            raise ConfigurationError(
                f"The metadata of {path} cannot be read: {one_line(error)} Fix it, or delete the file and pass "
                "`--new_card`."
            ) from error
    if not new_card:
        raise ConfigurationError(
            f"`{folder}` holds no model card ({CARD_FILE}). Pass the `output_dir` of a run, write a card, or pass "
            "`--new_card` for a short one without details of training."
        )
    return _short_card(folder, repo_id)


def _walk(folder: Path, root: Path, inside: tuple[Path, ...]) -> Iterator[Path]:
    """Yield the files of a folder, without entering folders that are never pushed.

    Args:
        folder (`Path`): the folder.
        root (`Path`): resolved path of what is pushed.
        inside (`tuple[Path, ...]`): resolved paths of the parent folders, to stop at a link to one of them.
    """
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and (why := _link_fault(path, root)):
            if not _matches(path.name, PRIVATE):
                logger.warning(f"{printable(str(path))} is not pushed: it is a link that {why}.")
        elif path.is_dir() and not _matches(path.name, (*PRIVATE, *_ELSEWHERE)):
            if (real := path.resolve()) not in inside:
                yield from _walk(path, root, (*inside, real))
        elif path.is_file() and not _matches(path.name, PRIVATE):
            yield path


def _link_fault(path: Path, root: Path) -> str | None:
    """Return why a link is not followed, if it is not."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return "has no target"
    if not real.is_relative_to(root):
        return "leaves the folder"
    if any(_matches(part, PRIVATE) for part in real.relative_to(root).parts):
        return "points to a file that is never pushed"
    return None


def processor_note(folder: Path) -> str | None:
    """Return a warning for a folder without an image processor; `None` if it has one."""
    if has_processor(folder):
        return None
    return (
        f"{printable(str(folder))} holds no image processor, so `pipeline` cannot load what is pushed. Save the one "
        "that the model was trained with next to it: `processor.save_pretrained(folder)`."
    )


def _check_links(folder: Path, files: Container[str]) -> None:
    """Raise if a part of the model would not be pushed, as in a folder of the Hub's cache."""
    missing = [path.name for path in (folder / CONFIG_NAME, *_weights(folder)[1]) if path.is_symlink()]
    if missing := [name for name in missing if name not in files]:
        raise ConfigurationError(
            f"`{folder}` holds {missing[0]} only as a link that leaves it. Push a copy that holds the files "
            "themselves, such as `cp -rL` makes."
        )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _weights(folder: Path) -> tuple[str, list[Path]]:
    """Return what a folder of this kind must hold, for messages, and its weights files."""
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return ADAPTER_SAFE_WEIGHTS_NAME, [folder / ADAPTER_SAFE_WEIGHTS_NAME]
    needed, index = f"{CONFIG_NAME} and {SAFE_WEIGHTS_NAME}", folder / SAFE_WEIGHTS_INDEX_NAME
    if not (folder / CONFIG_NAME).is_file():
        return needed, []
    if not index.is_file():
        return needed, [folder / SAFE_WEIGHTS_NAME]
    shards = _read(index).get("weight_map")
    # A name with a folder could lead anywhere.
    if not isinstance(shards, dict) or not all(isinstance(n, str) and n == Path(n).name for n in shards.values()):
        raise CheckpointError(
            f"{index} is not an index of weights. Save the model again, or push an earlier checkpoint."
        )
    return needed, [folder / shard for shard in sorted(set(shards.values()))]


def _check_weights(folder: Path) -> None:
    """Raise unless the folder holds a configuration and every weights file, complete."""
    needed, weights = _weights(folder)
    if not any(path.is_file() for path in weights):
        raise ConfigurationError(
            f"`{folder}` holds no model: {needed} was not found. Pass the `output_dir` of a run after `save_model()`, "
            "or one of its folders `checkpoint-<step>`."
        )
    for path in weights:
        if not path.is_file() or not is_whole_safetensors(path):
            raise CheckpointError(
                f"{path} is missing or cut short. Save the model again, or push an earlier checkpoint of it."
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not complete: {flat(error)}. Save the model again, or push an earlier checkpoint of it."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__} instead of a JSON object. Save the model again, or push an "
            "earlier checkpoint of it."
        )
    return content


def _text(value: object) -> str | None:
    """Return a string of a configuration; `None` for any other value."""
    return value if isinstance(value, str) and value.strip() else None


def _short_card(folder: Path, repo_id: str) -> str:
    """Return a card made from the configuration."""
    adapter = _read(folder / ADAPTER_CONFIG_NAME) if (folder / ADAPTER_CONFIG_NAME).is_file() else None
    config = _read(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    names = config.get("architectures")
    architecture = _text(names[0]) if isinstance(names, list) and names else None
    card = build_model_card(
        model_name=repo_id,
        base_model=None if adapter is None else _text(adapter.get("base_model_name_or_path")),
        settings=None,
        metrics={},
        architecture=architecture or "AutoModelForImageClassification",
        block_names=[],
        training={},
        adapter=None if adapter is None else _text(adapter.get("peft_type")) or "PEFT",
        has_processor=has_processor(folder),
    )
    return str(card)
