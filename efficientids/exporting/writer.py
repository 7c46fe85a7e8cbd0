"""The folder of an export while it is made."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core.weight_writing import Tensor, write_tensors
from efficientids.errors import UserError


@dataclasses.dataclass(frozen=True)
class Writer:
    """Where files go and how.

    Attributes:
        folder: exists.
        max_shard_bytes: of one weight file.
        progress: told (tensors written, all) of a set of weight files.
    """

    folder: Path
    max_shard_bytes: int
    progress: Callable[[int, int], None]

    def tensors(self, tensors: Mapping[str, Tensor], stem: str, *, one_file: bool = False) -> dict[str, str]:
        """Writes weight files; their names → sha256.

        Raises:
            UserError: the disk has no room for them.
        """
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{needed:,} bytes of {stem} files are to be written, and the disk of --output has {free:,} free; free "
                "some space, give an --output on another disk, or (with hf) a narrower --dtype"
            )
        limit = needed if one_file else self.max_shard_bytes
        return write_tensors(self.folder, tensors, stem=stem, max_shard_bytes=limit, progress=self.progress)

    def json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file."""
        (self.folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
