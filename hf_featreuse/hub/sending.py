"""Send files to a repository on the Hub in one commit, again where the connection failed, and say why it failed."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import logging

from hf_featreuse.errors import HubError
from hf_featreuse.hub.http_errors import TransportError
from hf_featreuse.text import kind_and_text

logger = logging.get_logger(__name__)

_Result = TypeVar("_Result")
# Seconds before each further attempt. The client itself repeats uploads of large files; it asks for a repository,
# has the card checked and commits once.
_WAITS = (1.0, 4.0)
CARD_FILE = "README.md"
_PASSING = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Target:
    """Where to push: the arguments of the Hub's client.

    Args:
        repo_id (`str`): id of the repository, with or without its owner.
        revision (`str`, *optional*): branch; the main one by default.
        private (`bool`, *optional*): visibility of a repository that is made; the owner's default where `None`.
        token (`str`, *optional*): the stored one by default.
    """

    repo_id: str
    revision: str | None = None
    private: bool | None = None
    token: str | None = None

    def again(self, folder: str | Path) -> str:
        """The command that pushes a folder here; a checkpoint of a run has no card yet."""
        more = [f"--revision {shlex.quote(self.revision)}"] if self.revision else []
        more += {True: ["--private"], False: ["--public"], None: []}[self.private]
        has_card = (Path(folder) / CARD_FILE).is_file()
        more += ["--new_card"] if not has_card and any(Path(folder).glob("*.safetensors")) else []
        return shlex.join(["featreuse", "push", str(folder), self.repo_id]) + "".join(f" {flag}" for flag in more)


def make_repository(api: HfApi, target: Target, folder: str | Path) -> str:
    """Make the repository and the branch unless they exist, and give the repository's id with its owner.

    Raises:
        HubError: the Hub refuses or does not answer.
    """

    def make() -> str:
        url = api.create_repo(target.repo_id, token=target.token, private=target.private, exist_ok=True)
        if target.revision is not None and target.revision != "main":
            api.create_branch(url.repo_id, branch=target.revision, token=target.token, exist_ok=True)
        return url.repo_id

    return _attempt(make, target, folder, f"Making the repository {target.repo_id}")


def send(
    api: HfApi, target: Target, files: Mapping[str, Path | bytes], message: str, folder: str | Path
) -> CommitInfo:
    """Commit files, given by their path in the repository.

    A second attempt sends what the Hub does not hold yet, so an attempt whose answer was lost makes no second commit.

    Args:
        api (`HfApi`): the client.
        target (`Target`): where to.
        files (`Mapping[str, Path | bytes]`): what to send.
        message (`str`): of the commit.
        folder (`str` or `Path`): what the user can push again, for the error.

    Raises:
        HubError: the push failed for good.
    """

    def commit() -> CommitInfo:
        # A client's operations are used up by an attempt.
        operations = [CommitOperationAdd(path, str(f) if isinstance(f, Path) else f) for path, f in files.items()]
        return api.create_commit(
            target.repo_id, operations, commit_message=message, token=target.token, revision=target.revision
        )

    return _attempt(commit, target, folder, f'The push "{message}" to {target.repo_id}')


def _attempt(call: Callable[[], _Result], target: Target, folder: str | Path, what: str) -> _Result:
    """Call, and call again after failures that pass."""
    for wait in (*_WAITS, None):
        try:
            return call()
        except Exception as error:  # Whatever it is, the user must be told how to push again.
            if wait is None or not _passes(error):
                raise HubError(
                    f"{what} failed: {_reason(error)} Nothing in {folder} is lost: `{target.again(folder)}` pushes it."
                ) from error
            logger.warning(f"{what} failed ({kind_and_text(error)}); trying again in {wait:g} s.")
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _passes(error: Exception) -> bool:
    """Whether a later attempt may succeed."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING
    return isinstance(error, TransportError)


def _reason(error: Exception) -> str:
    """Say what went wrong and what to do, before the push is repeated."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it."
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token. Run `hf auth login`, or set HF_TOKEN."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401 or isinstance(error, RepositoryNotFoundError):
        return (
            "the Hub does not accept the token, or there is no such repository for it. Log in with `hf auth login`, "
            "or set HF_TOKEN to a token that may write."
        )
    if status == 403:
        return "the token may not write there. Use a token with write access, or a namespace of your own."
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision. Pass a branch."
    if isinstance(error, TransportError) or status in _PASSING:
        return f"the Hub does not answer ({kind_and_text(error)}). Wait until it does."
    return f"{kind_and_text(error)}. Fix that first."
