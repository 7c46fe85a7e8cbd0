"""Writes an export in a hidden folder beside the place asked for, reads it back, and only then puts it there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from core.hf_export import Adapters, NotExportable
from core.read_back import TOLERANCE, ReadBackError
from core.weight_files import CheckpointError
from core.weight_writing import check_written
from efficientids.data.preparation.workplace import whole_folder
from efficientids.errors import UserError
from efficientids.exporting import tables
from efficientids.exporting.llama import (
    open_llama,
    read_merged,
    run_adapters,
    skeleton,
    write_adapter,
    write_merged,
)  # fmt: skip
from efficientids.exporting.readme import quantizing_text, readme, rounding_text, table_of
from efficientids.exporting.writer import Writer
from efficientids.loading import LoadedRun, open_run

Format = Literal["hf", "peft", "safetensors"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Job:
    """What to export.

    Attributes:
        run: R, R/STEP or R/checkpoints/STEP.
        step: None: the one `run` names, else the best.
        format: see the command's help.
        output: the folder to make.
        dtype: of the whole checkpoint of `hf`; None: each tensor's own in the base.
        max_shard_bytes: of one weight file.
    """

    run: Path
    step: int | None
    format: Format
    output: Path
    dtype: Dtype | None
    max_shard_bytes: int


class _Made(NamedTuple):
    """What was written: `facts` for export.json; the variables by our own names as a table, and their files."""

    facts: dict[str, Any]
    table: str
    files: list[str]


def export(job: Job, progress: Callable[[int, int], None], say: Callable[[str], None]) -> dict[str, Any]:
    """Does it; returns what `export.json` holds.

    Args:
        progress: told (tensors written, all) of a set of weight files.
        say: told what is done next.

    Raises:
        UserError: what cannot be exported so, a folder that cannot be written, or an export that did not read back as
            what it was written from. `output` is then as it was.
    """
    make = _as_tables if job.format == "safetensors" else _as_llama
    try:
        with whole_folder(job.output, "export") as folder:
            writer = Writer(folder, job.max_shard_bytes, progress)
            made = make(job, writer, say)
            check_written(folder, made.facts["files"])
            writer.json("export.json", made.facts)
            (folder / "README.md").write_text(readme(*made), encoding="utf-8")
    except (ReadBackError, CheckpointError, NotExportable) as error:
        raise UserError(f"{job.run}: {error}. Nothing was left at --output {job.output}") from error
    except OSError as error:
        raise UserError(f"--output {job.output} cannot be written ({error}); nothing was left there") from error
    return made.facts


def _as_tables(job: Job, writer: Writer, say: Callable[[str], None]) -> _Made:
    """All parameters and buffers, as the run holds them."""
    loaded = open_run(job.run, job.step)
    recommender, model = loaded.recommender, loaded.model
    facts = _facts(job, loaded, run_adapters(model), loaded.config.quantize)
    expected = tables.probe(recommender, model)
    found = tables.variables(model, with_llama=True)
    say(f"writing {len(found)} tensors")
    files = writer.tensors({name: variable.tensor for name, variable in found.items()}, "parameters")
    table = table_of(found)
    del loaded, model, found  # one model in memory is enough
    say("reading them back")
    tables.compare_ranked(
        tables.probe(recommender, tables.read_model(writer.folder, list(files), recommender)), expected
    )
    check = {"compared": "recommendations", "error": 0.0, "tolerance": 0.0}
    return _Made({**facts, "read_back": check, "files": files}, table, list(files))


def _as_llama(job: Job, writer: Writer, say: Callable[[str], None]) -> _Made:
    """The Llama for Hugging Face's programs, and the rest of the recommender beside it."""
    loaded, llama = open_llama(job.run, job.step)
    facts = _facts(job, loaded, llama.added, llama.quantize or "none") | {"quantize": "none"}
    found = tables.variables(skeleton(loaded), with_llama=False)
    say(f"the Llama: {'from ' + str(llama.folder) if llama.folder else 'from the checkpoint'}, writing")
    check: dict[str, Any] = {"compared": "logits", "tolerance": TOLERANCE}
    if job.format == "peft":
        files, facts["base_model"], found_off = write_adapter(llama, job.run, writer)
        check |= found_off
    else:
        files, wanted = write_merged(llama, job.dtype, writer)
        check |= {"rounding": wanted.rounding, "adapters": wanted.adapters, "quantizing": wanted.quantizing}
    beside = writer.tensors({name: variable.tensor for name, variable in found.items()}, "recommender")
    table, config = table_of(found), llama.config
    if check["quantizing"] is not None:
        say(f"note: {quantizing_text(facts['trained_with_quantize'], check)}")
    del loaded, llama, found  # one Llama in memory is enough
    if job.format == "hf":
        say("reading it back")
        check["error"] = read_merged(writer.folder, config, wanted)
        if wanted.adapters is not None and wanted.rounding > wanted.adapters / 2:
            say(f"warning: {rounding_text(check)}: much of what the adapters learnt is lost; give --dtype float32")
    return _Made({**facts, "read_back": check, "files": {**files, **beside}}, table, list(beside))


def _facts(job: Job, loaded: LoadedRun, added: Adapters | None, quantize: str) -> dict[str, Any]:
    return {
        "format": job.format,
        "run": str(loaded.where.resolve()),
        "step": loaded.step,
        "recommender": loaded.config.recommender,
        "dataset": loaded.description["dataset"],
        "lora": None if added is None else {**dataclasses.asdict(added.lora), "scale": added.lora.scale},
        "quantize": quantize,
        "trained_with_quantize": quantize,
    }
