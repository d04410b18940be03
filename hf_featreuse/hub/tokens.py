"""Tokens of the Hub: cleaned before they are used, and never part of a message."""

from __future__ import annotations

import contextlib
import os
import re

from huggingface_hub import get_token

from hf_featreuse.errors import ConfigurationError

# What a header can hold; another character would end up in the error of the HTTP library, with the token around it.
_VALID = re.compile(r"[!-~]+")
# Shorter ones are no secrets, and would blot out words.
_SHORTEST = 4


def clean_token(token: str, where: str = "`token` (--token, --hub_token)") -> str:
    """The token without blanks and line ends around it; raise `ConfigurationError`, without it, if it is none."""
    token = token.strip()
    if not token:
        raise ConfigurationError(f"{where} is empty. Pass a token of the Hub, or leave it out to use the stored one.")
    if _VALID.fullmatch(token) is None:
        raise ConfigurationError(
            f"{where} holds a blank, a control character or a letter that is not ASCII. Copy the token again from the "
            "settings of your account."
        )
    return token


def check_stored_token() -> None:
    """Raise `ConfigurationError` if the token that the client would take cannot be sent."""
    with contextlib.suppress(OSError):
        if stored := get_token():
            clean_token(stored, "The stored token (`HF_TOKEN`, or that of `hf auth login`)")


def redacted(text: str, token: str | bool | None) -> str:
    """The text with dots in place of this token and of those that the client finds by itself."""
    tokens = [token, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")]
    with contextlib.suppress(Exception):
        tokens.append(get_token())
    # The longest first: one may begin with another.
    for secret in sorted({one.strip() for one in tokens if isinstance(one, str)}, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, "...")
    return text
