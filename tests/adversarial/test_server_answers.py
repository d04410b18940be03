"""Server answers at every stage of a push, each with its verdict: the reason on one line, or a finished push.

The real client talks to a server on loopback. None of its answers may pass silently, end in a traceback, hang, make a
second commit, or bring the token into a message or to another server.
"""

import contextlib
import gzip
import io
import json
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from huggingface_hub import close_session
from tiny_checkpoints import save

from hf_featreuse import cli
from hf_featreuse.hub import limits, sending

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))
from hub_server import CUT, LOSE, Answer, serve

pytestmark = pytest.mark.slow

MOST_SECONDS = 60
STAGES = {
    "create": "POST /api/repos/create", "branch": "/branch/", "validate": "/api/validate-yaml",
    "preupload": "/preupload/", "batch": "/objects/batch", "upload": "PUT /lfs/", "verify": "/verify",
    "commit": "/commit/",
}  # fmt: skip
# Those whose answer the client reads.
READS = ("create", "validate", "preupload", "batch", "commit")
REASON = "Storage quota of ada is exceeded"
PAGE = b"<html><head><title>502 Bad Gateway</title></head><body>\x1b[31mnginx</body></html>"
TOKEN, SECOND = "hf_writes", "http://localhost"
ADVICE = "pushes it"


@dataclass(frozen=True)
class Case:
    """An answer at a stage, and a part of the message; without a message the push succeeds."""

    stage: str
    name: str
    answer: int | Answer
    message: str | None
    times: float = float("inf")

    def __str__(self) -> str:
        return f"{self.stage}-{self.name}"


def said(status: int, **headers: str) -> Answer:
    return Answer(status, json.dumps({"error": REASON}).encode(), {"Content-Type": "application/json", **headers})


def page(status: int) -> Answer:
    return Answer(status, PAGE, {"Content-Type": "text/html"})


def statuses() -> list[Case]:
    """Refusals and failures that state a reason, and pages of a gateway."""
    cases = []
    for stage in STAGES:
        for status in (400, 401, 402, 403, 404, 410, 413, 422, 429, 500, 503, 507):
            # A card that is refused is named; this server gives no errors of it.
            message = "Invalid metadata in README.md" if (stage, status) == ("validate", 400) else REASON
            cases.append(Case(stage, f"status {status}", said(status), message))
        cases.append(Case(stage, "page 502", page(502), "the Hub does not answer (status 502)"))
        cases.append(Case(stage, "page 404", page(404), ADVICE))
        cases.append(Case(stage, "wait a day", said(429, **{"Retry-After": "86400"}), "asks to wait 86,400 seconds"))
        cases.append(Case(stage, "list of errors", Answer(503, b"[1]"), "does not answer (status 503)"))
        cases.append(Case(stage, "status 503 once", said(503), None, 1))
    reset = {"RateLimit": '"api";r=0;t=7200'}
    cases.append(Case("preupload", "rate limit", said(429, **reset), "asks to wait 7,200 seconds"))
    conflict = Answer(409, b'{"error": "Cannot create repo: another conflicting operation is in progress"}')
    cases.append(Case("create", "conflict for good", conflict, "another conflicting operation"))
    cases.append(Case("create", "conflict once", conflict, None, 1))
    return cases


def contents() -> list[Case]:
    """Answers with status 200 that are not what the client expects."""
    bodies = {
        "nothing": b"", "half": b'{"url": ', "page": PAGE, "binary": b"\xff\xfe\x00", "list": b"[1, 2]",
        "null": b"null", "number": b"5", "text": b'"x"', "deep": b"[" * 200_000, "gzip": b"\x1f\x8b\x08broken",
    }  # fmt: skip
    cases = [
        Case(stage, f"body {name}", Answer(body=body), "not what its client expects")
        for stage in READS
        for name, body in bodies.items()
    ]
    cases += [Case(stage, "empty object", Answer(body=b"{}"), "not what") for stage in READS if stage != "validate"]
    for name, body, message in (
        ("number for url", b'{"url": 5}', "not what"),
        ("another repository", b'{"url": "http://hub/eve/other"}', ADVICE),
        ("another owner", b'{"url": "http://hub/eve/x"}', ADVICE),
    ):
        cases.append(Case("create", name, Answer(body=body), message))
    for name, body in {
        "no commit": b'{"commitUrl": null, "commitOid": null}', "numbers": b'{"commitUrl": 1, "commitOid": 2}',
        "empty names": b'{"commitUrl": "", "commitOid": ""}', "no id": b'{"commitUrl": "http://hub/x"}',
    }.items():  # fmt: skip
        cases.append(Case("commit", name, Answer(body=body), ADVICE))
    for name, body in {
        "no files": b'{"files": 5}', "files of numbers": b'{"files": [1]}',
        "unknown mode": b'{"files": [{"path": "config.json", "uploadMode": "post"}]}',
    }.items():  # fmt: skip
        cases.append(Case("preupload", name, Answer(body=body), "not what"))
    for name, body in {
        "no objects": b'{"objects": 5}', "objects of numbers": b'{"objects": [1]}',
        "error": b'{"objects": [{"oid": "a", "size": 1, "error": {"code": 413, "message": "too large: 7f"}}]}',
    }.items():  # fmt: skip
        cases.append(Case("batch", name, Answer(body=body), "too large: 7f" if name == "error" else "not what"))
    return cases


def connections() -> list[Case]:
    """What happens below the content."""
    bomb = gzip.compress(bytes(1 << 30), 9)
    cases = []
    for stage in STAGES:
        cases += [
            Case(stage, "cut", CUT, "does not answer"),
            Case(stage, "cut once", CUT, None, 1),
            Case(stage, "done and cut", LOSE, None, 1),
            Case(stage, "redirect", Answer(307, b"", {"Location": f"{SECOND}/steal"}), "redirects to another server"),
        ]
        if stage != "verify":
            cases.append(Case(stage, "loop", Answer(307, b"", {"Location": "/api/repos/create"}), ADVICE))
    for stage in READS:
        cases += [
            Case(stage, "silent", Answer(silent=True), "does not answer"),
            Case(stage, "endless", Answer(body=b" " * (1 << 20), endless=True), "answer of more than"),
            Case(stage, "slow", Answer(body=b" " * 500, pause=0.05), "takes more than"),
            Case(stage, "bomb", Answer(body=bomb, headers={"Content-Encoding": "gzip"}), "answer is refused"),
            Case(stage, "short", Answer(body=b"{}", headers={"Content-Length": "900"}), "does not answer"),
        ]
    return cases


# The file is there when verifying fails, so the next attempt neither sends nor verifies it.
_VERIFIED_LATER = ("status 429", "status 500", "status 503", "page 502", "list of errors", "cut")
CASES = [
    replace(case, message=None) if case.stage == "verify" and case.name in _VERIFIED_LATER else case
    for case in (*statuses(), *contents(), *connections())
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return Path(save(tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture(scope="module")
def hub():
    with serve() as hub:
        yield hub


@pytest.fixture
def push(hub, folder, monkeypatch):
    """Push in this process, whose client is sent to the server and waits for less."""
    hub.faults.clear()
    hub.repositories.clear()
    hub.large.clear()
    hub.requests.clear()
    sleep = time.sleep
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(limits, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(limits, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(sending, "_WAITS", (0.0, 0.0))
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.001)))
    close_session()
    yield SimpleNamespace(run=lambda: command(folder))
    close_session()


def command(folder: Path) -> tuple[int, str, str]:
    def stop(*_):
        raise AssertionError(f"not over after {MOST_SECONDS} s")

    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MOST_SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(["push", str(folder), "ada/x", "--revision", "v1", "--new_card"])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("answered", CASES, ids=str)
def test_an_answer_of_a_server(answered, hub, push):
    answer = answered.answer
    if isinstance(answer, Answer) and SECOND in answer.headers.get("Location", ""):
        # The same server under another name.
        answer = Answer(307, b"", {"Location": f"{SECOND}:{hub.server_port}/steal"})
    hub.fail(STAGES[answered.stage], answer, answered.times)
    code, out, err = push.run()
    made = hub.commits("ada/x", "v1") if "v1" in getattr(hub.repositories.get("ada/x"), "branches", {}) else []
    assert TOKEN not in out + err and "unexpected error" not in err and "Traceback" not in err
    assert not any("steal" in request for request in hub.requests)
    if answered.message is None:
        assert (code, len(made)) == (0, 1), err
        assert f"{hub.url}/ada/x/commit/" in out and "model.safetensors" in made[0].files
        return
    lines = err.splitlines()
    assert code == 1 and out == "" and made == [], (out, err)
    assert lines[-1].startswith("featreuse: ") and lines[-1].isprintable()
    assert answered.message in lines[-1] and ADVICE in lines[-1], err


def test_the_answers_are_many():
    assert len(CASES) >= 200 and len(set(map(str, CASES))) == len(CASES)
