"""What of a folder goes to the Hub, and pushing a folder that is there already."""

from __future__ import annotations

import fnmatch
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from hf_featreuse.checkpoints.completeness import is_whole_safetensors
from hf_featreuse.errors import CheckpointError, ConfigurationError
from hf_featreuse.hub.averaged import save_averaged
from hf_featreuse.hub.card import build_model_card
from hf_featreuse.hub.sending import CARD_FILE, Target, make_repository, send
from hf_featreuse.recipe.weight_average import AVERAGE_FILE

# Never pushed. `training_args.bin` is a pickle of the training arguments, the user's token among them.
PRIVATE = ("training_args.bin", "_*", ".*", "__pycache__")
# What a checkpoint holds for resuming alone.
FOR_RESUMING = (
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "resume_state*.json", "global_step*"),
    AVERAGE_FILE,
)
# Trials of a search and of trackers, and checkpoints that a kill cut short.
_ELSEWHERE = ("run-*", "unfinished-*")
_CHECKPOINTS = (f"{PREFIX_CHECKPOINT_DIR}-*", "last-checkpoint")
# Of a model, in one file or in shards.
_WEIGHTS = ("model*.safetensors", SAFE_WEIGHTS_INDEX_NAME)
_REPOSITORY_LINE = re.compile(r'^repository = "[^"\n]*"$', re.MULTILINE)


def files_to_push(folder: str | Path, *, checkpoints: bool = False, for_resuming: bool = False) -> dict[str, Path]:
    """List the files of a run or checkpoint folder that belong on the Hub, by their path in the repository.

    Folders of single trials of a hyperparameter search, `run-<trial>`, do not.

    Args:
        folder (`str` or `Path`): the folder.
        checkpoints (`bool`, defaults to `False`): the folders `checkpoint-<step>` too, with what resuming needs.
        for_resuming (`bool`, defaults to `False`): optimizer, scheduler and random states of the folder itself too.
    """
    root, found = Path(folder), {}
    for path in _walk(root):
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
    for resuming stay here unless `checkpoints` is set; `training_args.bin`, which holds the token that training was
    given, always does. Of a checkpoint of a run with `ema_decay` the averaged weights are pushed. The snippet on a
    card of this package is made to name the repository.

    Args:
        folder (`str` or `Path`): with a model or a PEFT adapter in safetensors, its configuration and a model card.
        repo_id (`str`): `"owner/name"`, or a name in your own namespace. It is made if missing.
        private (`bool`, *optional*): visibility of a repository that is made; by default the owner's setting.
        revision (`str`, *optional*): branch, made if missing; by default the main one.
        token (`str`, *optional*): by default the stored one, or `HF_TOKEN`.
        checkpoints (`bool`, defaults to `False`): push the folders `checkpoint-<step>` too.
        new_card (`bool`, defaults to `False`): where the folder holds no card, push a short one made from its
            configuration. It says nothing of training.
        message (`str`, defaults to `"Upload model"`): of the commit.

    Returns:
        `str`: address of the commit.

    Raises:
        ConfigurationError: the folder is none, or holds no model or card; `repo_id` is no id; or the average of an
            adapter's weights lies beside them.
        CheckpointError: a file of weights is cut short or missing, or the average is of another model.
        HubError: the push failed.

    Example:
        >>> from hf_featreuse.hub import push_folder
        >>> push_folder("no/such/folder", "ada/vit-digits")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        hf_featreuse.errors.ConfigurationError: `no/such/folder` is no folder. Pass the `output_dir` of a run, or ...
    """
    folder = Path(folder)
    card = check_folder_to_push(folder, repo_id, new_card=new_card)
    target = Target(repo_id, revision, private, token)
    api = HfApi(library_name="hf_featreuse")
    files: dict[str, Path | bytes] = {**files_to_push(folder, checkpoints=checkpoints)}
    with tempfile.TemporaryDirectory() as averaged:
        if (folder / AVERAGE_FILE).is_file():
            files = {path: file for path, file in files.items() if not _matches(path, _WEIGHTS)}
            files |= {path.name: path for path in save_averaged(folder, averaged) if _matches(path.name, _WEIGHTS)}
        name = make_repository(api, target, folder)
        files[CARD_FILE] = _REPOSITORY_LINE.sub(f'repository = "{name}"', card, count=1).encode()
        return str(send(api, Target(name, revision, private, token), files, message, folder).commit_url)


def check_folder_to_push(folder: Path, repo_id: str, *, new_card: bool = False) -> str:
    """Raise unless a folder can be pushed to a repository; give the text of its card."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigurationError(
            f"`{repo_id}` is no repository id: {str(error).splitlines()[0]} Pass `owner/name`."
        ) from error
    if not folder.is_dir():
        raise ConfigurationError(
            f"`{folder}` is no folder. Pass the `output_dir` of a run, or a folder that `save_pretrained` wrote."
        )
    _check_weights(folder)
    path = folder / CARD_FILE
    if path.is_file():
        try:
            return str(ModelCard.load(path))
        except Exception as error:  # Of the YAML parser, or of the metadata's own checks.
            raise ConfigurationError(
                f"The metadata of {path} cannot be read: {' '.join(str(error).split())} Mend it, or delete the file "
                "and pass `--new_card`."
            ) from error
    if not new_card:
        raise ConfigurationError(
            f"`{folder}` holds no model card ({CARD_FILE}). Pass the `output_dir` of a run, write a card, or pass "
            "`--new_card` for a short one that says nothing of training."
        )
    return _short_card(folder, repo_id)


def _walk(root: Path) -> Iterator[Path]:
    """The files of a folder; folders that are never pushed are not looked into."""
    for path in sorted(root.iterdir()):
        if path.is_dir() and not _matches(path.name, (*PRIVATE, *_ELSEWHERE)):
            yield from _walk(path)
        elif path.is_file() and not _matches(path.name, PRIVATE):
            yield path


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_weights(folder: Path) -> None:
    """Raise unless the folder holds a configuration and every file of its weights, whole."""
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        needed, weights = ADAPTER_SAFE_WEIGHTS_NAME, [folder / ADAPTER_SAFE_WEIGHTS_NAME]
    else:
        needed, weights = f"{CONFIG_NAME} and {SAFE_WEIGHTS_NAME}", [folder / SAFE_WEIGHTS_NAME]
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if index.is_file():
            weights = [folder / shard for shard in sorted(set(_read(index)["weight_map"].values()))]
        if not (folder / CONFIG_NAME).is_file():
            weights = []
    if not any(path.is_file() for path in weights):
        raise ConfigurationError(
            f"`{folder}` holds no model: {needed} are looked for. Pass the `output_dir` of a run after "
            "`save_model()`, or one of its folders `checkpoint-<step>`."
        )
    for path in weights:
        if not path.is_file() or not is_whole_safetensors(path):
            raise CheckpointError(
                f"{path} is not whole: it is missing or cut short. Save the model again, or push an earlier "
                "checkpoint of it."
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not whole: {error}. Save the model again, or push an earlier checkpoint of it."
        ) from error


def _short_card(folder: Path, repo_id: str) -> str:
    """A card of what the configuration says."""
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        adapter = _read(folder / ADAPTER_CONFIG_NAME)
        peft_type, base = str(adapter["peft_type"]), adapter.get("base_model_name_or_path")
    else:
        peft_type, base = None, None
    config = folder / CONFIG_NAME
    names = _read(config).get("architectures") if config.is_file() else None
    card = build_model_card(
        model_name=repo_id,
        base_model=base,
        settings=None,
        metrics={},
        architecture=(names or ["AutoModelForImageClassification"])[0],
        block_names=[],
        training={},
        adapter=peft_type,
    )
    return str(card)
