"""Sequence packing: share of positions that are no padding and real positions a second, a row a user against packed.

`python benchmarks/packing.py --data_dir data/ml-1m --weights PATH/TO/stories260K/hf [--rows 16 --seq_len 256 512]`.
The folder of weights gives the shape and the tokenizer; the parameters are random, for speed does not depend on them. A
step is loss and gradients of all parameters. Histories are cut as training cuts them, so that batches differ in nothing
but the packing; `items` is how many items of a user found a place.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from machine import header, seconds  # isort: skip  # sets jax up

import jax
import numpy as np
from flax import nnx

from core.config import LlamaConfig
from core.embeddings import Woven, items_only, weave
from core.models import LlamaEfficientIDSModel
from core.models.efficientids import EfficientIDSConfig
from core.packing import PackPlan, pack_histories
from efficientids.data.batches import Bucket, training_batches
from efficientids.data.dataset import Dataset
from efficientids.data.texts import templates
from efficientids.data.texts.tokens import title_table

BATCHES = 20  # of which the shares are means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq_len", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--title_tokens", type=int, default=16, help="0: items alone")
    options = parser.parse_args()
    dataset, llama = Dataset.open(options.data_dir), LlamaConfig.from_hf(options.weights / "config.json")
    titles, bos = np.full((dataset.catalogue_size + 1, 0), -1, np.int32), 0
    if options.title_tokens:
        titles, bos = title_table(
            dataset.items, templates.load("title"), options.weights / "tokenizer.json", options.title_tokens,
            llama.vocab_size,
        )  # fmt: skip
    print(header())
    print(f"{dataset.manifest['name']}, {options.rows} rows, {'titles' if options.title_tokens else 'items alone'}")
    print(f"{'positions':>9}{'':>9}{'users':>7}{'share':>8}{'items':>8}{'s/step':>9}{'real/s':>10}{'host ms':>9}")
    for seq_len in options.seq_len:
        rates = []
        for packed in (False, True):
            users, share, items, host, step = measure(dataset, llama, titles, bos, options.rows, seq_len, packed)
            rates.append(share * options.rows * seq_len / step)
            print(
                f"{seq_len:>9}{'packed' if packed else 'padded':>9}{users:>7}{share:>8.3f}{items:>8.1f}{step:>9.3f}"
                f"{rates[-1]:>10,.0f}{host * 1e3:>9.2f}",
                flush=True,
            )
        print(f"{seq_len:>9}  packed / padded: {rates[1] / rates[0]:.2f} times the real positions a second")


def measure(
    dataset: Dataset, llama: LlamaConfig, titles_NK: np.ndarray, bos: int, rows: int, seq_len: int, packed: bool
) -> tuple[int, float, float, float, float]:
    """Users a batch, share of real positions, items kept a user, seconds to pack on the host, seconds a step."""
    text = titles_NK.shape[1] > 0
    widths_N = 1 + (titles_NK >= 0).sum(1)
    mean_width = widths_N[dataset.item_ids].mean()
    longest = seq_len // 2 if text else seq_len
    window = max(2, int((seq_len - text) / mean_width))
    if packed:
        ends = np.concatenate([[0], np.cumsum(widths_N[dataset.item_ids])])
        sizes_U = ends[dataset.offsets[:-1] + dataset.train_lengths] - ends[dataset.offsets[:-1]]
        plan = PackPlan.of(sizes_U, dataset.train_lengths, rows=rows, positions=seq_len, bos=int(text))
    else:
        plan = PackPlan(rows, rows, seq_len, longest, int(text))
    batches = training_batches(dataset, [Bucket(longest, plan.histories)], seed=0, window_items=window)
    real = kept = host = 0.0
    for _ in range(BATCHES):
        batch = next(batches)
        inputs = (batch["item_ids"], batch["lengths"])
        if packed:
            made = []
            host += seconds(lambda i=inputs, m=made: m.append(pack_histories(*i, widths_N, plan)), repeats=1)  # type: ignore[misc]
            inputs = (made[-1].item_ids, made[-1].lengths, made[-1].segments)
        sequence = woven(inputs, titles_NK, bos, seq_len)
        real += float(sequence.lengths.sum()) / (rows * seq_len)
        kept += float(sequence.item_mask.sum())
    step = step_of(dataset, llama, titles_NK, bos, seq_len, plan.items)
    arrays = tuple(jax.numpy.asarray(x) for x in inputs)
    items = kept / (BATCHES * plan.histories)
    return plan.histories, real / BATCHES, items, host / BATCHES, seconds(lambda: step(arrays))


def woven(inputs: tuple[np.ndarray, ...], titles_NK: np.ndarray, bos: int, seq_len: int) -> Woven:
    """The Llama's input; `inputs` are item ids, lengths and, of packed rows, segments."""
    if not titles_NK.shape[1]:
        return items_only(*inputs)
    return weave(inputs[0], inputs[1], jax.numpy.asarray(titles_NK), bos, seq_len, *inputs[2:])


def step_of(
    dataset: Dataset, llama: LlamaConfig, titles_NK: np.ndarray, bos: int, seq_len: int, max_targets: int
) -> Callable[[tuple[jax.Array, ...]], object]:
    """Loss and gradients of a batch."""
    config = EfficientIDSConfig(llama, dataset.catalogue_size, item_dim=llama.hidden_size)
    graphdef, params = nnx.split(LlamaEfficientIDSModel(config, jax.random.key(0)))

    @jax.jit
    def step(params: nnx.State, inputs: tuple[jax.Array, ...]) -> object:
        def loss(p: nnx.State) -> jax.Array:
            return nnx.merge(graphdef, p).loss(woven(inputs, titles_NK, bos, seq_len), max_targets).item_loss

        return jax.value_and_grad(loss)(params)

    return lambda inputs: step(params, inputs)


if __name__ == "__main__":
    main()
