"""What of a folder goes to the Hub, and pushing a folder that is there already."""

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
_REPOSITORY_LINE = re.compile(r'^repository = "(?:[^"\\\n]|\\.)*"$', re.MULTILINE)


def files_to_push(folder: str | Path, *, checkpoints: bool = False, for_resuming: bool = False) -> dict[str, Path]:
    """List the files of a run or checkpoint folder that belong on the Hub, by their path in the repository.

    Folders of single trials of a hyperparameter search, `run-<trial>`, do not. Links that leave the folder, or that
    lead to what is never pushed, are skipped with a warning.

    Args:
        folder (`str` or `Path`): the folder.
        checkpoints (`bool`, defaults to `False`): the folders `checkpoint-<step>` too, with what resuming needs.
        for_resuming (`bool`, defaults to `False`): optimizer, scheduler and random states of the folder itself too.
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
    """Raise unless a folder can be pushed to a repository; give the text of its card."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigurationError(
            f"`{repo_id}` is not a repository id: {first_sentence(error)} Pass `owner/name`."
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
                f"The metadata of {path} cannot be read: {one_line(error)} Fix it, or delete the file and pass "
                "`--new_card`."
            ) from error
    if not new_card:
        raise ConfigurationError(
            f"`{folder}` holds no model card ({CARD_FILE}). Pass the `output_dir` of a run, write a card, or pass "
            "`--new_card` for a short one that says nothing of training."
        )
    return _short_card(folder, repo_id)


def _walk(folder: Path, root: Path, inside: tuple[Path, ...]) -> Iterator[Path]:
    """The files of a folder; folders that are never pushed are not looked into.

    Args:
        folder (`Path`): the folder.
        root (`Path`): what is pushed, without links.
        inside (`tuple[Path, ...]`): the folders on the way here, without links: one that holds itself would never end.
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
    """Why a link is not followed, if it is not."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return "leads nowhere"
    if not real.is_relative_to(root):
        return "leaves the folder"
    if any(_matches(part, PRIVATE) for part in real.relative_to(root).parts):
        return "leads to what is never pushed"
    return None


def processor_note(folder: Path) -> str | None:
    """What a user of a folder without an image processor should know, if it has none."""
    if has_processor(folder):
        return None
    return (
        f"{printable(str(folder))} holds no image processor, so `pipeline` cannot load what is pushed. Save the one "
        "that the model was trained with beside it: `processor.save_pretrained(folder)`."
    )


def _check_links(folder: Path, files: Container[str]) -> None:
    """Raise if what the model consists of is not pushed, as in a folder of the Hub's cache."""
    missing = [path.name for path in (folder / CONFIG_NAME, *_weights(folder)[1]) if path.is_symlink()]
    if missing := [name for name in missing if name not in files]:
        raise ConfigurationError(
            f"`{folder}` holds {missing[0]} only as a link that leaves it. Push a copy that holds the files "
            "themselves: `cp -rL` makes one."
        )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _weights(folder: Path) -> tuple[str, list[Path]]:
    """What a folder of its kind must hold, in words, and its files of weights."""
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
    """Raise unless the folder holds a configuration and every file of its weights, whole."""
    needed, weights = _weights(folder)
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not whole: {flat(error)}. Save the model again, or push an earlier checkpoint of it."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__} instead of a JSON object. Save the model again, or push an "
            "earlier checkpoint of it."
        )
    return content


def _text(value: object) -> str | None:
    """A string of a configuration; what is none there is not quoted."""
    return value if isinstance(value, str) and value.strip() else None


def _short_card(folder: Path, repo_id: str) -> str:
    """A card of what the configuration says."""
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
