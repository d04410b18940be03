"""Tokens are cleaned, checked before anything is sent, and never part of a message."""

import traceback
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from tiny_checkpoints import save

from hf_featreuse import ConfigurationError, HubError
from hf_featreuse.hub import sending
from hf_featreuse.hub.folders import push_folder
from hf_featreuse.hub.http_errors import TransportError
from hf_featreuse.hub.sending import Target, send
from hf_featreuse.hub.tokens import redacted

SECRET = "hf_secretsecret"


@pytest.mark.parametrize("around", ["{}\n", "  {}\r\n", "\t{} ", "{}"])
def test_blanks_and_line_ends_around_a_token_are_stripped(around):
    assert Target("ada/x", token=around.format(SECRET)).token == SECRET


@pytest.mark.parametrize("bad", ["hf_secret secret", "hf_secret\nsecret", "hf_secret\x1b[0m", "hf_secrét", "hf_\x00x"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(bad, tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match=r"--token.*control character") as error:
        push_folder(save(tmp_path / "model"), "ada/x", token=bad, new_card=True)
    assert bad not in repr(error.value) and "secr" not in str(error.value)
    if "\x00" not in bad and "\n" not in bad:  # Which no variable can hold, or the client drops.
        monkeypatch.setenv("HF_TOKEN", bad)
        with pytest.raises(ConfigurationError, match=r"stored token \(`HF_TOKEN`") as error:
            push_folder(tmp_path / "model", "ada/x", new_card=True)
        assert "secr" not in str(error.value)


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_token_is_refused(empty):
    with pytest.raises(ConfigurationError, match="is empty"):
        Target("ada/x", token=empty)


@pytest.mark.parametrize("error", [RuntimeError, TransportError, OSError, ValueError])
def test_no_token_is_in_an_error_its_traceback_or_a_warning(error, monkeypatch, tmp_path):
    """Errors of other libraries quote what they could not send."""

    def fail(*_, **__):
        raise error(f"Illegal header value b'Bearer {SECRET}' or {SECRET[::-1]}")

    said: list[str] = []
    monkeypatch.setenv("HF_TOKEN", SECRET[::-1])
    monkeypatch.setattr(sending, "_WAITS", (0.0,))
    monkeypatch.setattr(sending.logger, "warning", said.append)
    monkeypatch.setattr(HfApi, "create_commit", fail)
    with pytest.raises(HubError, match="Illegal header") as raised:
        send(HfApi(), Target("ada/x", token=SECRET), {}, "message", tmp_path)
    text = "".join(traceback.format_exception(raised.value)) + "".join(said)
    assert SECRET not in text and SECRET[::-1] not in text and "..." in text
    assert len(said) == (error is TransportError)


def test_of_two_tokens_that_begin_alike_nothing_is_left(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcd")
    assert redacted("hf_abcd hf_abcdefgh x", "hf_abcdefgh\n") == "... ... x"


@pytest.mark.parametrize("branch", ["", "a b", "x..y", "-x", "a\nb", "a~1", "x.lock", "/x", "x/", "a\\b", "\x1b[31m"])
def test_a_revision_that_is_not_a_branch_is_refused_before_anything_is_sent(branch, tmp_path):
    with pytest.raises(ConfigurationError, match="not the name of a branch") as error:
        push_folder(Path(save(tmp_path / "model")), "ada/x", revision=branch, new_card=True)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("branch", ["main", "v1.0", "feature/x-y", "refs/pr/3"])
def test_a_branch_is_accepted(branch):
    assert Target("ada/x", branch).revision == branch
