"""Fetches a public MovieLens archive, checks it, and unpacks it safely."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path

from efficientids.errors import UserError

GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
_TIMEOUT_S = 60
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Archive:
    """A zip file `file` under the base URL, of exactly `size` bytes and this sha256."""

    file: str
    size: int
    sha256: str


# Sizes and checksums as TensorFlow Datasets pins them (url_checksums/movielens.txt).
ARCHIVES: Mapping[str, Archive] = {
    "ml-1m": Archive("ml-1m.zip", 5_917_549, "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"),
    "ml-latest-small": Archive(
        "ml-latest-small.zip", 978_202, "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436"
    ),
}


def download(
    name: str, folder: str | Path, *, base_url: str = GROUPLENS, archives: Mapping[str, Archive] = ARCHIVES
) -> Path:
    """Fetches archive `name` and makes `folder` out of its one top folder; returns `folder`.

    `folder` must be new or empty, and appears only when all went well. Raises UserError for an unknown name, a folder
    in use, no network, another size or checksum, and an archive whose paths lead outside.
    """
    folder = Path(folder)
    if name not in archives:
        raise UserError(f"archive: {name!r} is none of {', '.join(archives)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder}: not empty, so nothing is fetched into it; leave out --download to read what it holds"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        file = Path(temporary) / "archive.zip"
        _fetch(base_url + archives[name].file, archives[name], file)
        unpacked = _unpack(file, Path(temporary) / "unpacked")
        if folder.exists():
            folder.rmdir()
        shutil.move(unpacked, folder)
    return folder


def _fetch(url: str, archive: Archive, file: Path) -> None:
    digest, size = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, file.open("wb") as out:
            # One byte beyond the known size is enough to know that it is another file.
            while size <= archive.size and (chunk := response.read(min(_CHUNK, archive.size + 1 - size))):
                out.write(chunk)
                digest.update(chunk)
                size += len(chunk)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise UserError(
            f"{url}: cannot be fetched ({error}). Check the network, or fetch the file elsewhere, unpack it and give "
            "the folder as --input without --download"
        ) from error
    if size != archive.size or digest.hexdigest() != archive.sha256:
        found = f"{size} bytes, sha256 {digest.hexdigest()}"
        raise UserError(
            f"{url}: not the expected file ({found}; expected {archive.size} bytes, sha256 {archive.sha256}). "
            "The transfer was cut or altered, or the archive was republished; try again"
        )


def _unpack(file: Path, into: Path) -> Path:
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.namelist():
                if not (into / member).resolve().is_relative_to(into.resolve()):
                    raise UserError(f"{file.name}: member {member!r} leads outside its folder; nothing is unpacked")
            archive.extractall(into)
    except zipfile.BadZipFile as error:
        raise UserError(f"{file.name}: not a zip archive ({error})") from error
    folders = [entry for entry in into.iterdir() if entry.is_dir()]
    if len(folders) != 1:
        raise UserError(f"{file.name}: holds {len(folders)} top folders, expected 1")
    return folders[0]
