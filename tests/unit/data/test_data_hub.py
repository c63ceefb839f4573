"""Data sets are downloaded by the hub's library, from a server on this machine that answers as the
hub does."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import close_session, constants

from mcore_rl.data.rows import read_rows
from mcore_rl.data.sources import find_files
from mcore_rl.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "main/train-00000-of-00001.jsonl": b'{"prompt": "1+1=", "ground_truth": "2"}\n',
    "main/test-00000-of-00001.jsonl": b'{"prompt": "2+2=", "ground_truth": "4"}\n',
    "sums.py": b"raise SystemExit",
}


class Hub(BaseHTTPRequestHandler):
    """The data set someone/sums, and one that needs a token."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        api, resolve = "/api/datasets/someone/sums/", f"/datasets/someone/sums/resolve/{COMMIT}/"
        if path == f"{api}revision/main":
            self.answer({"id": "someone/sums", "sha": COMMIT, "private": False, "siblings": []})
        elif path == f"{api}tree/{COMMIT}":
            self.answer(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": "0"}
                    for name, content in FILES.items()
                ]
            )
        elif path.startswith(resolve):
            self.answer_bytes(FILES[path.removeprefix(resolve)])
        else:
            self.send_error(401 if "gated" in path else 404)

    do_HEAD = do_GET

    def answer(self, value):
        self.answer_bytes(json.dumps(value).encode())

    def answer_bytes(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Have the library ask a server of this test, and return the paths that it asks for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    url = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("NO_PROXY", "no_proxy"):  # the lower-case one would win
        monkeypatch.setenv(name, "127.0.0.1")
    close_session()  # one of an earlier test may go by a proxy
    yield server.asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_data_set_is_downloaded_once_and_only_its_data(asked):
    (row,) = read_rows("someone/sums@test")
    assert row.columns == {"prompt": "2+2=", "ground_truth": "4"}
    downloaded = {path for path in asked if "/resolve/" in path}
    assert {path.partition(f"{COMMIT}/")[2] for path in downloaded} == FILES.keys() - {"sums.py"}
    asked.clear()
    (row,) = read_rows("someone/sums:main@train")
    assert row.columns["ground_truth"] == "2"
    assert not any("/resolve/" in path for path in asked)


@pytest.mark.parametrize(("name", "status"), [("someone/none", "404"), ("someone/gated", "401")])
def test_what_the_hub_does_not_give_is_named_with_its_answer(asked, name, status):
    with pytest.raises(UserError, match=rf"{name}@test: .*{status}") as error:
        find_files(f"{name}@test")
    assert asked
    assert "\n" not in str(error.value)
    assert "HF_HUB_OFFLINE" not in str(error.value)
