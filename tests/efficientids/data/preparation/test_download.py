"""Fetching an archive: from a local stand-in, with its own checksum."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from efficientids.data.preparation.download import ARCHIVES, Archive, download
from efficientids.errors import UserError


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """served/ml-tiny.zip, holding ml-tiny/ratings.dat."""
    (tmp_path / "served").mkdir()
    file = tmp_path / "served" / "ml-tiny.zip"
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("ml-tiny/ratings.dat", "1::10::5::978300760\n")
        out.writestr("ml-tiny/README", "hello")
    return file


def _table(file: Path) -> dict[str, Archive]:
    raw = file.read_bytes()
    return {"ml-tiny": Archive(file.name, len(raw), hashlib.sha256(raw).hexdigest())}


@pytest.fixture
def server(archive: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/"
        running.shutdown()
        thread.join()


def test_the_archive_becomes_the_folder(archive: Path, server: str, tmp_path: Path) -> None:
    folder = download("ml-tiny", tmp_path / "new" / "here", base_url=server, archives=_table(archive))
    assert folder == tmp_path / "new" / "here"
    assert (folder / "ratings.dat").read_text() == "1::10::5::978300760\n"
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["here"]  # nothing temporary is left


@pytest.mark.parametrize("change", [b"longer", b""])
def test_another_file_is_refused(archive: Path, server: str, tmp_path: Path, change: bytes) -> None:
    table = _table(archive)
    raw = bytearray(archive.read_bytes())
    raw[40] ^= 1  # same size, another content; or longer than it should be
    archive.write_bytes(bytes(raw) + change)
    with pytest.raises(UserError, match=r"not the expected file .* bytes, sha256"):
        download("ml-tiny", tmp_path / "here", base_url=server, archives=table)
    assert not (tmp_path / "here").exists()


def test_no_network_and_no_file(archive: Path, server: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be fetched .*give the folder as --input without --download"):
        download("ml-tiny", tmp_path / "here", base_url="http://127.0.0.1:9/", archives=_table(archive))
    table = {"ml-tiny": Archive("other.zip", 1, "")}
    with pytest.raises(UserError, match=r"other\.zip: cannot be fetched .*404"):
        download("ml-tiny", tmp_path / "here", base_url=server, archives=table)


@pytest.mark.parametrize("member", ["../outside.txt", "ml-tiny/../../outside.txt", "/outside.txt"])
def test_paths_that_lead_outside_are_refused(archive: Path, server: str, tmp_path: Path, member: str) -> None:
    with zipfile.ZipFile(archive, "a") as out:
        out.writestr(member, "harm")
    with pytest.raises(UserError, match="leads outside its folder; nothing is unpacked"):
        download("ml-tiny", tmp_path / "here", base_url=server, archives=_table(archive))
    assert not list(tmp_path.rglob("outside.txt")) and not (tmp_path / "here").exists()


def test_what_is_no_zip_or_has_no_folder_is_refused(archive: Path, server: str, tmp_path: Path) -> None:
    archive.write_bytes(b"hello")
    with pytest.raises(UserError, match="not a zip archive"):
        download("ml-tiny", tmp_path / "here", base_url=server, archives=_table(archive))
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("ratings.dat", "")
    with pytest.raises(UserError, match="holds 0 top folders, expected 1"):
        download("ml-tiny", tmp_path / "here", base_url=server, archives=_table(archive))


def test_a_folder_in_use_is_left_alone(archive: Path, server: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty, so nothing is fetched into it"):
        download("ml-tiny", tmp_path / "here", base_url=server, archives=_table(archive))
    assert [entry.name for entry in (tmp_path / "here").iterdir()] == ["thesis.tex"]


def test_known_archives(tmp_path: Path) -> None:
    assert set(ARCHIVES) == {"ml-1m", "ml-latest-small"}
    with pytest.raises(UserError, match="archive: 'ml-9m' is none of ml-1m, ml-latest-small"):
        download("ml-9m", tmp_path / "here")
