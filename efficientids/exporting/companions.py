"""What stands beside the weights in the folder that a Llama came from, and belongs beside the exported ones."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from core.config import LLAMA_SIZES
from efficientids.options import TrainConfig
from efficientids.systems.llama import starts_at_random

# A tokenizer, how to generate, and the terms of use: whoever passes weights on passes these on, too.
_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.*",
    "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CODE = "auto_map"  # families whose code is beside their weights (Baichuan); copied, never run here
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")


class Source(NamedTuple):
    """A model's name for others: on the hub, with its revision, or a folder of this machine."""

    name: str
    revision: str | None

    @staticmethod
    def of(folder: Path) -> Source:
        """Of a folder; one in the hub's cache is known by its path."""
        cached = _SNAPSHOT.search(folder.as_posix())
        return Source(str(folder), None) if cached is None else Source(cached[1].replace("--", "/"), cached[2])


def started_from(config: TrainConfig) -> Path | None:
    """The folder that a run's Llama started from, if it is still on this machine; nothing is downloaded."""
    if starts_at_random(config):
        return None
    if config.weights is not None:
        return config.weights if config.weights.is_dir() else None
    from huggingface_hub import try_to_load_from_cache

    repo = LLAMA_SIZES[config.llama_size].hf_id
    cached = None if repo is None else try_to_load_from_cache(repo, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def copy_companions(source: Path, folder: Path) -> dict[str, Any]:
    """Copies the files; returns the fields of the source's `config.json` that are no part of a `LlamaConfig`."""
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    code = sorted(source.glob("*.py")) if fields.get(_CODE) else []
    kept = [*_TOKEN_IDS, *([_CODE] if code else [])]
    for file in [*code, *(found for pattern in _FILES for found in sorted(source.glob(pattern)))]:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    return {name: fields[name] for name in kept if name in fields}
