"""Send files to a repository on the Hub in one commit, retry if the connection fails, and explain failures."""

from __future__ import annotations

import re
import shlex
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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

from hf_featreuse.errors import ConfigurationError, HubError
from hf_featreuse.hub.http_errors import HTTPStatusError, TransportError
from hf_featreuse.hub.limits import RefusedAnswer, limited_requests
from hf_featreuse.hub.tokens import check_stored_token, clean_token, redacted
from hf_featreuse.text import flat, kind_and_text, printable

logger = logging.get_logger(__name__)

_Result = TypeVar("_Result")
# Seconds before each further attempt. The client itself repeats only uploads of large files; it creates a repository,
# has the card checked and commits once.
_WAITS = (1.0, 4.0)
CARD_FILE = "README.md"
_PASSING = (408, 429, 500, 502, 503, 504)
_MOST_WORDS = 400
# What git allows in the name of a branch; a leading dash would make it an option.
_BRANCH = re.compile(r"(?![-/.])(?!.*(\.\.|//|@\{|[/.]$|\.lock$))[^\s\x00-\x20\x7f~^:?*\[\\]+")


@dataclass(frozen=True)
class Target:
    """Where to push: the arguments of the Hub's client.

    Args:
        repo_id (`str`): id of the repository, with or without its owner.
        revision (`str`, *optional*): branch; the main one by default.
        private (`bool`, *optional*): visibility of a new repository; the owner's default if `None`.
        token (`str`, *optional*): the stored one by default.

    Raises:
        ConfigurationError: the token or the revision is not valid.
    """

    repo_id: str
    revision: str | None = None
    private: bool | None = None
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.token, str):
            object.__setattr__(self, "token", clean_token(self.token))
        if self.revision is not None and _BRANCH.fullmatch(self.revision) is None:
            raise ConfigurationError(
                f"`revision={printable(self.revision)!r}` (--revision) is not the name of a branch. Pass one such as "
                "`main` or `v1`."
            )

    def again(self, folder: str | Path) -> str:
        """Return the command that pushes a folder to this target; a checkpoint of a run has no card yet."""
        more = [f"--revision {shlex.quote(self.revision)}"] if self.revision else []
        more += {True: ["--private"], False: ["--public"], None: []}[self.private]
        has_card = (Path(folder) / CARD_FILE).is_file()
        more += ["--new_card"] if not has_card and any(Path(folder).glob("*.safetensors")) else []
        return shlex.join(["featreuse", "push", str(folder), self.repo_id]) + "".join(f" {flag}" for flag in more)


def make_repository(api: HfApi, target: Target, folder: str | Path) -> str:
    """Create the repository and the branch unless they exist, and return the repository's id with its owner.

    Raises:
        HubError: the Hub refuses or does not answer.
    """

    def make() -> str:
        url = api.create_repo(target.repo_id, token=target.token, private=target.private, exist_ok=True)
        owner, _, name = target.repo_id.rpartition("/")
        made_owner, _, made_name = url.repo_id.rpartition("/")
        if made_name.lower() != name.lower() or (owner and made_owner.lower() != owner.lower()):
            raise RefusedAnswer(f"the repository {url.repo_id} was made instead")
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
        target (`Target`): where to send them.
        files (`Mapping[str, Path | bytes]`): what to send.
        message (`str`): message of the commit.
        folder (`str` or `Path`): what the user can push again, named in the error.

    Raises:
        HubError: the push failed, also when repeated.
    """

    def commit() -> CommitInfo:
        # Operations cannot be used for a second attempt.
        operations = [CommitOperationAdd(path, str(f) if isinstance(f, Path) else f) for path, f in files.items()]
        info = api.create_commit(
            target.repo_id, operations, commit_message=message, token=target.token, revision=target.revision
        )
        if not all(isinstance(word, str) and word for word in (info.commit_url, info.oid)):
            raise RefusedAnswer("an answer that names no commit")
        return info

    return _attempt(commit, target, folder, f'The push "{message}" to {target.repo_id}')


def _attempt(call: Callable[[], _Result], target: Target, folder: str | Path, what: str) -> _Result:
    """Call a function, again after failures that may be temporary."""
    if target.token is None:
        check_stored_token()
    for wait in (*_WAITS, None):
        try:
            with limited_requests():
                return call()
        except Exception as error:  # Whatever it is, the user must learn how to push again.
            if wait is None or not _passes(error):
                told = (
                    f"{what} failed: {_reason(error)} Nothing in {folder} is lost: `{target.again(folder)}` pushes it."
                )
                whole = "".join(traceback.format_exception(error))
                # A traceback prints the causes of an error too.
                cause = error if redacted(whole, target.token) == whole else None
                raise HubError(printable(redacted(told, target.token))) from cause
            told = f"{what} failed ({kind_and_text(error)}); trying again in {wait:g} s."
            logger.warning(printable(redacted(told, target.token)))
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _of_request(error: Exception) -> Exception:
    """Return the error of the request, which the client may have wrapped in its own."""
    found: BaseException | None = error
    kinds = (RefusedAnswer, TransportError, HfHubHTTPError, HTTPStatusError)
    while found is not None and not isinstance(found, kinds):
        found = found.__cause__ or found.__context__
    return found if isinstance(found, kinds) else error


def _status(error: Exception) -> int | None:
    """Return the status of the answer that an error is about."""
    return error.response.status_code if isinstance(error, (HTTPStatusError, HfHubHTTPError)) else None


def _passes(error: Exception) -> bool:
    """Return whether a later attempt may succeed."""
    error = _of_request(error)
    return isinstance(error, TransportError) or _status(error) in _PASSING


def _words(error: Exception) -> str:
    """Return the server's reason for its refusal as a sentence; empty if it gave none."""
    said = flat(error.server_message or "") if isinstance(error, HfHubHTTPError) else ""
    # A gateway sends an HTML page.
    return f' The Hub says: "{said[:_MOST_WORDS]}".' if said and not said.startswith("<") else ""


def _reason(error: Exception) -> str:
    """Describe what went wrong and what to do before the push is repeated."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it."
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token. Run `hf auth login`, or set HF_TOKEN."
    if "Invalid metadata in README.md" in str(error):
        return f"{kind_and_text(error)}. Fix that first."
    error = _of_request(error)
    status, words = _status(error), _words(error)
    if isinstance(error, RevisionNotFoundError):
        return f"there is no such revision.{words} Pass a branch."
    if status == 401 or isinstance(error, RepositoryNotFoundError):
        return (
            f"the Hub does not accept the token, or there is no such repository for it.{words} Log in with `hf auth "
            "login`, or set HF_TOKEN to a token that may write."
        )
    if status == 403:
        return (
            f"the token may not write there.{words} Use a token with write access, or your own namespace; if the Hub "
            "names a quota, free space first."
        )
    if isinstance(error, RefusedAnswer):
        return f"the Hub's answer is refused: {flat(error)}. Check HF_ENDPOINT and your proxy, or wait."
    if isinstance(error, TransportError) or status in _PASSING:
        return f"the Hub does not answer ({_shown(error, status)}).{words} Wait until it does."
    if status is not None and status >= 400:
        return f"the Hub refuses it ({_shown(error, status)}).{words} Fix that first."
    if isinstance(error, OSError):
        return f"{kind_and_text(error)}. Fix that first."
    return (
        f"the Hub's answer is not what its client expects ({kind_and_text(error)}). Check HF_ENDPOINT and your proxy."
    )


def _shown(error: Exception, status: int | None) -> str:
    """Return the status of an answer, else the error."""
    return kind_and_text(error) if status is None else f"status {status}"
