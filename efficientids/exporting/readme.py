"""The README.md of an export: what is in the folder, from which run, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from efficientids.exporting.tables import Variable

_AXES = """\
A name is the variable's path in the model. Capitals at its end are its axes: N items (row 0 is padding, row i the item
whose `item` is i in the data set's items.parquet; `N1` is N + 1 as well), C clusters, M members of the largest cluster
or neighbours of an item, E item dimension, D width, R rank, K tokens of a title, T positions, V vocabulary. Below
`layers` the first axis is the layer; there linear maps are [layer, in-axes, out-axes]."""

_HF = """\
`model*.safetensors`, `config.json`: the Llama, whole{merged}. `transformers`, vLLM and others load the folder; here it
serves as `--weights`, and as below.

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("FOLDER")

from core.llama_loader import LlamaLoader
model, params, config = LlamaLoader(path="FOLDER").load_model()  # model.apply(params, input_ids=…) → logits
```"""

_PEFT = """\
`adapter_model.safetensors`, `adapter_config.json`: the LoRA adapters of the Llama, for the base {base}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "FOLDER")
```"""

_BESIDE = """\
Without it the Llama reads and writes text alone: items have vectors and a head of their own, which no such format has a
place for. vLLM, too, serves the Llama and not the recommender."""

_LOAD = """\
```python
import ml_dtypes  # before safetensors, for bfloat16
from safetensors.numpy import load_file
tensors = load_file("FOLDER/{file}")
```

The run folder itself is what `python -m efficientids recommend` and `efficientids.load_run` read."""


def readme(facts: Mapping[str, Any], table: str, files: list[str]) -> str:
    """The text.

    Args:
        facts: what `export.json` holds.
        table: of the variables in `files` (`table_of`).
    """
    parts = [f"# {facts['recommender']}, exported as {facts['format']}", _origin(facts)]
    if facts["format"] == "hf":
        parts += ["## The Llama", _HF.format(merged=", adapters merged in float32" if facts["lora"] else "")]
    if facts["format"] == "peft":
        parts += ["## The adapters", _PEFT.format(base=facts["base_model"])]
    whole = facts["format"] == "safetensors"
    parts += ["## The whole model" if whole else "## The rest of the recommender"]
    parts += [f"In {', '.join(f'`{file}`' for file in files)}.\n{_AXES}{_held(facts) if whole else ''}", table]
    parts += [*([] if whole else [_BESIDE]), _LOAD.format(file=files[0])]
    return "\n\n".join(parts) + "\n"


def _held(facts: Mapping[str, Any]) -> str:
    """How the Llama's matrices are to be read where they are not plain."""
    text = ""
    if facts["lora"]:
        text += f" An adapter adds {facts['lora']['scale']:g} · A B to its weight."
    if facts["quantize"] != "none":
        text += f" `codes` and `scales` are {facts['quantize']}: `core.quantized.dequantize` makes weights of them."
    return text


def _origin(facts: Mapping[str, Any]) -> str:
    data, check = facts["dataset"], facts["read_back"]
    apart, allowed = check["error"], check["tolerance"]
    far = ": equal" if not allowed else f": {apart:.1e} of the largest apart, at most {allowed:.0e} allowed"
    lines = [
        f"From the run {facts['run']}, step {facts['step']}, trained on the data set {data['path']}",
        f"(fingerprint {data['fingerprint']}, sha256 of its item ids {data['items_sha256']}).",
        f"Read back after writing, and its {check['compared']} compared with those it must have{far}.",
        *([f"In all, {rounding_text(check)}."] if check.get("rounding") else []),
        *([f"{quantizing_text(facts['trained_with_quantize'], check)}."] if check.get("quantizing") else []),
        "`export.json` has the sha256 of every weight file.",
    ]
    return "\n".join(lines)


def rounding_text(check: Mapping[str, Any]) -> str:
    """What merging and rounding do to the logits, beside what the adapters do."""
    adapters = "" if check["adapters"] is None else f", and the adapters by {check['adapters']:.1e}"
    return f"rounding the weights moves the run's logits by {check['rounding']:.1e} of the largest{adapters}"


def quantizing_text(quantize: str, check: Mapping[str, Any]) -> str:
    """What the whole base in place of the quantised one does to the logits."""
    return (
        f"The run trained on a base held in {quantize}; on the whole one, which is what this is for, its logits are "
        f"{check['quantizing']:.1e} of the largest apart from those in training"
    )


def table_of(found: Mapping[str, Variable]) -> str:
    """A table of variables in Markdown."""
    rows = ["| tensor | shape | dtype | what | part of |", "|---|---|---|---|---|"]
    for name, (tensor, kind, part) in found.items():
        rows.append(f"| `{name}` | {list(tensor.shape)} | {tensor.dtype} | {kind} | {part.replace('|', ' ')} |")
    return "\n".join(rows)
