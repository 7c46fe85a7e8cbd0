"""Weights of a size: a stand-in for the hub on the loopback interface speaks what the real client asks for."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

from core.config import LLAMA_SIZES, LlamaSize
from core.llama_loader import LlamaLoader
from core.weight_files import CheckpointError, WeightsNotFound
from tests.core.checkpoints import SMALL, assert_same, tensors_of, write

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_standinstandinstandin"


class Hub(http.server.BaseHTTPRequestHandler):
    """One gated repository, `toys/toy`: its listing, its files, and a list of the files that were sent."""

    protocol_version = "HTTP/1.1"
    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        if path.startswith("/api/models/toys/toy/tree/"):
            files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
            names = [(str(file.relative_to(self.folder)), file.stat().st_size) for file in files]
            tree = [{"type": "file", "path": n, "size": size, "oid": f"{i:040}"} for i, (n, size) in enumerate(names)]
            return self.answer(200, json.dumps(tree).encode())
        if path in ("/api/models/toys/toy", "/api/models/toys/toy/revision/main"):
            return self.answer(200, json.dumps({"id": "toys/toy", "sha": COMMIT, "siblings": []}).encode())
        prefix = f"/toys/toy/resolve/{COMMIT}/"
        if path.startswith(prefix) and (self.folder / path.removeprefix(prefix)).is_file():
            name = path.removeprefix(prefix)
            self.asked += [name] * (self.command == "GET")
            return self.answer(200, (self.folder / name).read_bytes(), {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})
        return self.answer(404, b"{}")

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """Serves the checkpoint in `hub.folder` as the size "toy"."""
    (tmp_path / "hub").mkdir()
    handler = type("ToyHub", (Hub,), {"folder": tmp_path / "hub", "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(LLAMA_SIZES, "toy", LlamaSize(SMALL, "toys/toy"))
    yield handler
    server.shutdown()
    server.server_close()


def test_a_size_is_downloaded_once_without_what_is_not_needed(hub: type[Hub], tmp_path: Path) -> None:
    tensors = tensors_of(SMALL)
    local = LlamaLoader(path=write(hub.folder, SMALL, tensors, shards=2)).load_model()[1]
    (hub.folder / "original").mkdir()
    for name in ("pytorch_model.bin", "modeling.py", "original/params.json", "README.md"):
        (hub.folder / name).write_text("no")
    assert_same(local, LlamaLoader("toy", revision="main").load_model()[1])
    wanted = {"config.json", "model.safetensors.index.json", *(file.name for file in hub.folder.glob("*.safetensors"))}
    assert set(hub.asked) == wanted
    hub.asked.clear()
    LlamaLoader("toy").load_model()
    assert not hub.asked


def test_a_tokenizer_is_downloaded_without_the_weights(hub: type[Hub]) -> None:
    tensors = tensors_of(SMALL)
    local = LlamaLoader(path=write(hub.folder, SMALL, tensors, shards=2)).load_model()[1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (hub.folder / name).write_text("{}")
    folder = LlamaLoader("toy").tokenizer_folder()
    assert sorted(hub.asked) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert {file.name for file in folder.iterdir()} == set(hub.asked)
    assert_same(local, LlamaLoader("toy").load_model()[1])  # what is there already does not pass for all of it
    assert LlamaLoader(path=hub.folder).tokenizer_folder() == hub.folder


def test_a_download_without_room_is_refused_before_its_first_byte(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(hub.folder, SMALL, tensors_of(SMALL))
    monkeypatch.setattr("core.llama_loader.shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(CheckpointError, match=r"toys/toy: .* GiB are to be downloaded .* set HF_HUB_CACHE"):
        LlamaLoader("toy").load_model()
    assert not hub.asked


def test_bin_is_downloaded_where_there_is_nothing_else(hub: type[Hub]) -> None:
    torch = pytest.importorskip("torch", reason=".bin needs torch (requirements-torch.txt)")
    tensors = tensors_of(SMALL)
    local = LlamaLoader(path=write(hub.folder, SMALL, tensors)).load_model()[1]
    torch.save({name: torch.from_numpy(t) for name, t in tensors.items()}, hub.folder / "pytorch_model.bin")
    (hub.folder / "model.safetensors").unlink()
    assert_same(local, LlamaLoader("toy").load_model()[1])


NO_ACCESS = r"'toy': toys/toy cannot be had.*HF_TOKEN.*https://huggingface\.co/toys/toy.*--weights"


@pytest.mark.parametrize("token", [None, "hf_wrongwrongwrong"])
def test_no_access(hub: type[Hub], monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    write(hub.folder, SMALL, tensors_of(SMALL))
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(WeightsNotFound, match=NO_ACCESS) as error:
        LlamaLoader("toy").load_model()
    assert "hf_" not in str(error.value) and not hub.asked


def test_no_network(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody there
    with pytest.raises(WeightsNotFound, match=NO_ACCESS):
        LlamaLoader("toy").load_model()
