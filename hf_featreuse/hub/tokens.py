"""Clean tokens of the Hub before they are used, and keep them out of messages."""

from __future__ import annotations

import contextlib
import os
import re

from huggingface_hub import get_token

from hf_featreuse.errors import ConfigurationError

# What a header can hold; any other character would put the token into an error of the HTTP library.
_VALID = re.compile(r"[!-~]+")
# Shorter ones are not secrets, and would hide words.
_SHORTEST = 4


def clean_token(token: str, where: str = "`token` (--token, --hub_token)") -> str:
    """Return the stripped token; raise `ConfigurationError`, without quoting it, if it is not valid."""
    token = token.strip()
    if not token:
        raise ConfigurationError(f"{where} is empty. Pass a token of the Hub, or leave it out to use the stored one.")
    if _VALID.fullmatch(token) is None:
        raise ConfigurationError(
            f"{where} holds a space, a control character or a character that is not ASCII. Copy the token again from "
            "the settings of your account."
        )
    return token


def check_stored_token() -> None:
    """Raise `ConfigurationError` if the token that the client would use cannot be sent."""
    with contextlib.suppress(OSError):
        if stored := get_token():
            clean_token(stored, "The stored token (`HF_TOKEN`, or that of `hf auth login`)")


def redacted(text: str, token: str | bool | None) -> str:
    """Return the text with dots in place of this token and of those that the client finds itself."""
    tokens = [token, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")]
    with contextlib.suppress(Exception):
        tokens.append(get_token())
    # The longest first: a token may start with another.
    for secret in sorted({one.strip() for one in tokens if isinstance(one, str)}, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, "...")
    return text
