"""While a push runs, its requests are limited, and downloads of files by others are not."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session, get_session

from hf_featreuse.hub import limits
from hf_featreuse.hub.limits import RefusedAnswer, limited_requests

BODY = b"x" * 5000


class Handler(BaseHTTPRequestHandler):
    """Answers with a body, or sends the client to the same server under another name."""

    def do_GET(self):
        if "elsewhere" in self.path:
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/file")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def address(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(limits, "ANSWER_BYTES", 1000)
    with limited_requests():
        close_session()  # The next one has the hooks.
        yield f"http://127.0.0.1:{server.server_port}"
    close_session()
    server.shutdown()


@pytest.mark.parametrize("path", ["/datasets/ada/x/resolve/main/train.parquet", "/ada/x/resolve/main/elsewhere/api/a"])
def test_a_data_set_that_is_streamed_meanwhile_may_be_large_and_come_from_another_server(address, path):
    answer = get_session().get(address + path, follow_redirects=True)
    assert answer.status_code == 200 and answer.content == BODY


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("GET", "/api/models/ada/x", "more than 1,000 bytes"),
        ("POST", "/ada/x.git/info/lfs/objects/batch", "more than 1,000 bytes"),
        ("GET", "/api/elsewhere", "redirects to another server, localhost"),
    ],
)
def test_what_a_push_asks_for_is_limited(address, method, path, message):
    with pytest.raises(RefusedAnswer, match=message):
        get_session().request(method, address + path, follow_redirects=True)


def test_without_a_push_nothing_is_limited(address, monkeypatch):
    monkeypatch.setattr(limits, "_running", 0)
    assert get_session().get(f"{address}/api/models/ada/x").content == BODY
