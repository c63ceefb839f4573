"""Data sets and models are downloaded by the hub's library, from a server on this machine that
answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import close_session, constants

from mcore_rl.data.rows import read_rows
from mcore_rl.data.sources import find_files
from mcore_rl.errors import UserError
from mcore_rl.model_files import fetch_model, find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "main/train-00000-of-00001.jsonl": b'{"prompt": "1+1=", "ground_truth": "2"}\n',
    "main/test-00000-of-00001.jsonl": b'{"prompt": "2+2=", "ground_truth": "4"}\n',
    "sums.py": b"raise SystemExit",
}


MODEL_FILES = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"",
    "additional_chat_templates/tools.jinja": b"",
    "model-00001-of-00001.safetensors": b"",
    "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00001.safetensors"}}',
}
REST_OF_THE_MODEL = {
    "README.md": b"",
    "consolidated.safetensors": b"",
    "modeling_sums.py": b"raise SystemExit",
    "onnx/model.safetensors": b"",
    "original/consolidated.00.pth": b"",
    "pytorch_model.bin": b"",
}


class Hub(BaseHTTPRequestHandler):
    """The data set and the model someone/sums, and one of each that needs a token."""

    server: Any
    """With `asked`, the paths that it was asked for."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        for kind, prefix, files in (
            ("datasets", "datasets/", FILES),
            ("models", "", MODEL_FILES | REST_OF_THE_MODEL),
        ):
            api = f"/api/{kind}/someone/sums/"
            resolve = f"/{prefix}someone/sums/resolve/{COMMIT}/"
            if path == f"{api}revision/main":
                return self.answer({"id": "someone/sums", "sha": COMMIT, "siblings": []})
            if path == f"{api}tree/{COMMIT}":
                return self.answer(
                    [
                        {"type": "file", "path": name, "size": len(content), "oid": "0"}
                        for name, content in files.items()
                    ]
                )
            if path.startswith(resolve):
                return self.answer_bytes(files[path.removeprefix(resolve)])
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
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    url = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
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


def test_of_a_model_only_what_is_read_is_downloaded_and_once(asked, monkeypatch):
    def downloaded():
        paths = {path for path in asked if "/resolve/" in path}
        asked.clear()
        return {path.partition(f"{COMMIT}/")[2] for path in paths}

    name = fetch_model("someone/sums", "model.path", weights=False)
    assert name == f"someone/sums@{COMMIT}"
    assert downloaded() == {file for file in MODEL_FILES if not file.startswith("model")}
    assert fetch_model("someone/sums", "model.path") == name
    assert downloaded() == {file for file in MODEL_FILES if file.startswith("model")}
    assert fetch_model(name, "model.path") == name
    folder = find_model(name)
    assert not asked
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == set(
        MODEL_FILES
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_model("someone/sums", "model.path") == name
    assert not asked


@pytest.mark.parametrize(("name", "status"), [("someone/none", "404"), ("someone/gated", "401")])
def test_a_model_that_the_hub_does_not_give_is_named_with_its_answer(asked, name, status):
    with pytest.raises(UserError, match=rf"^model\.path='{name}' .*{status}") as error:
        fetch_model(name, "model.path")
    assert asked
    assert "\n" not in str(error.value)


def test_without_the_variable_the_hub_is_not_asked(asked, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=0"):
        fetch_model("someone/sums", "model.path")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=0"):
        find_files("someone/sums@test")
    assert not asked
