"""Generating semantic IDs: our beam search against Hugging Face's `generate`, and what the trie costs a step.

`python benchmarks/generate.py [generate trie] [--items 12101 --history 20 --rows 16 --beams 20] [--json OUT.json]`

generate: one Llama with random weights on both sides. The peer gets the codes as a vocabulary of its own: rows of its
embedding are the code vectors through the input projector, rows of its head the tables through the output projector;
its trie is a dictionary behind `prefix_allowed_tokens_fn`. It renormalises over the allowed tokens
(`renormalize_logits`), as ours does with normalise="children"; items and scores are compared before anything is timed.
Both sides run in one process in turn, from item ids to item ids on the host: ours is `ETEGRec.recommend` over the table
of a run, also with its default scores. Speed is users a second (each gets k items); latency is of one user.

trie: one step of constraint and selection (log-softmax, gather of children, top beams) on catalogues of random codes,
beside the same step over the whole alphabet without a trie, and the build's seconds on the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import header, seconds  # isort: skip  # sets jax up

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from generate_peer import Peer

from core.beam_search import Normalise
from core.code_tables import build, largest_shape
from core.config import LlamaConfig
from core.layers import Init
from core.llama import Compute
from core.models import ETEGRecConfig
from core.semantic_ids import SemanticIDs
from core.suffixes import with_suffix
from efficientids.recommenders.base import Histories
from efficientids.recommenders.etegrec import ETEGRec
from efficientids.recommenders.etegrec_model import ETEGRecModel, ETEGRecSpec

ON_GPU = jax.default_backend() == "gpu"
ALPHABET = (256, 256, 256)
# hidden, MLP width, layers, heads, head width; small is about the paper's decoder
SHAPES = {"small": (128, 512, 6, 4, 32), "medium": (512, 1408, 12, 8, 64)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["generate", "trie"], help="generate, trie")
    parser.add_argument("--size", choices=SHAPES, default="small")
    parser.add_argument("--items", type=int, default=12_101)
    parser.add_argument("--history", type=int, default=20)
    parser.add_argument("--rows", type=int, default=16, help="users a batch")
    parser.add_argument("--beams", type=int, default=20)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=5, help="timed batches, after one that is not")
    parser.add_argument("--calls", type=int, default=100, help="timed calls of one user on our side")
    parser.add_argument("--peer_calls", type=int, default=20)
    parser.add_argument("--trie_items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(header(), flush=True)
    results: dict[str, Any] = {}
    if "generate" in options.what:
        results["generate"] = generate(options)
    if "trie" in options.what:
        results["trie"] = [trie(count, options.rows, options.beams) for count in options.trie_items]
    if options.json is not None:
        options.json.write_text(json.dumps({"options": vars(options), "results": results}, default=str))


def catalogue(count: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Random codes of three levels with their suffixes, and the alphabets."""
    codes = with_suffix(np.random.default_rng(0).integers(0, ALPHABET, (count, 3), dtype=np.int32))
    return codes, (*ALPHABET, max(256, int(codes[:, -1].max()) + 1))


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """Equal results first, then users a second and latency of both sides."""
    codes, sizes = catalogue(options.items)
    model = make_model(options.size, codes, sizes, options)
    rng = np.random.default_rng(1)
    histories = rng.integers(1, options.items + 1, (options.rows, options.history)).astype(np.int32)
    lengths = rng.integers(options.history // 2, options.history + 1, options.rows).astype(np.int32)
    lengths[0] = options.history
    peer = Peer(model, codes, sizes, options.beams, options.k)
    ours, alphabet = our_side(model, options, "children"), our_side(model, options, "alphabet")
    theirs = peer.recommend(histories, lengths)
    mine = ours(histories, lengths)
    agree = compare(mine, theirs)
    print(
        f"equal before timing: {agree:.2%} of {mine[1].size} places hold the same item, scores within 1e-3", flush=True
    )
    found: dict[str, Any] = {"same_items": agree, "peer": peer.versions}
    for name, call, repeats in (
        ("ours", lambda: ours(histories, lengths), options.repeat),
        ("ours, alphabet", lambda: alphabet(histories, lengths), options.repeat),
        ("peer", lambda: peer.recommend(histories, lengths), max(1, options.repeat // 2)),
    ):
        found[name] = {"users_per_s": options.rows / seconds(call, repeats)}
    one = histories[:1], lengths[:1]
    for name, call, calls in (
        ("ours", lambda: ours(*one), options.calls),
        ("peer", lambda: peer.recommend(*one), options.peer_calls),
    ):
        found[name] |= latency(call, calls)
    shown = f"{options.size}, {options.items:,} items, history {options.history}, beam {options.beams}"
    for name in ("ours", "ours, alphabet", "peer"):
        row = found[name]
        text = (
            f"p50 {row['p50_ms']:.1f} ms  p99 {row['p99_ms']:.1f} ms  ({row['calls']} calls)" if "calls" in row else ""
        )
        print(f"{shown}: {name:<16}{row['users_per_s']:>9.1f} users/s at {options.rows} a batch  {text}", flush=True)
    found["ratio"] = found["ours"]["users_per_s"] / found["peer"]["users_per_s"]
    found["latency_ratio"] = found["peer"]["p50_ms"] / found["ours"]["p50_ms"]
    print(f"ours / peer: {found['ratio']:.1f} x the users a second; one user {found['latency_ratio']:.1f} x as fast")
    return found


def make_model(size: str, codes: np.ndarray, sizes: tuple[int, ...], options: argparse.Namespace) -> ETEGRecModel:
    """Random weights, large enough that scores differ; the table as a run has it, of the largest shape that re-indexing
    can come to."""
    hidden, mlp, layers, heads, head_dim = SHAPES[size]
    llama = LlamaConfig(8, hidden, mlp, layers, heads, heads, head_dim, 4096, 1e-5, 10000.0, None, False)
    config = ETEGRecConfig(llama, sizes, init_std=0.2)
    table = largest_shape(sizes, len(codes))
    spec = ETEGRecSpec(config, len(codes), options.history, table, tokenizer=None, beams=options.beams)
    model = system(spec, "children").init(jax.random.key(0))
    nnx.update(model.ids, nnx.state(build(codes, sizes, table)))
    return model


def system(spec: ETEGRecSpec, normalise: Normalise) -> ETEGRec:
    """ETEGRec as a run has it."""
    return ETEGRec(dataclasses.replace(spec, normalise=normalise), compute=Compute(), init=Init(0.1))


def our_side(
    model: ETEGRecModel, options: argparse.Namespace, normalise: Normalise
) -> Callable[[np.ndarray, np.ndarray], Any]:
    """(histories, lengths) → (scores, items): what evaluation and serving call, from NumPy to NumPy."""
    ours = system(model.spec, normalise)

    def recommend(histories: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = ours.recommend(model, Histories(histories, lengths), options.k, None)
        return found.scores, found.item_ids

    return recommend


def compare(mine: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> float:
    """The share of places with the same item.

    Raises:
        SystemExit: scores differ by more than 1e-3, or fewer than 99% of the items agree (equal to rounding, two may
            change places).
    """
    worst = float(np.abs(mine[0] - theirs[0]).max())
    agree = float((mine[1] == theirs[1]).mean())
    if worst > 1e-3 or agree < 0.99:
        raise SystemExit(
            f"the two sides differ: scores by {worst:.2g}, {agree:.1%} of the items agree; nothing is timed"
        )
    return agree


def latency(call: Callable[[], Any], calls: int) -> dict[str, float]:
    """p50 and p99 in milliseconds, after one call that compiles."""
    call()
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return {"p50_ms": float(np.quantile(times, 0.5)), "p99_ms": float(np.quantile(times, 0.99)), "calls": calls}


def trie(count: int, rows: int, beams: int) -> dict[str, Any]:
    """Seconds to build, and milliseconds of a step at each level behind the first, at the catalogue's own widths and at
    the widest there can be."""
    codes, sizes = catalogue(count)
    began = time.perf_counter()
    own = jax.block_until_ready(build(codes, sizes))
    found: dict[str, Any] = {"items": count, "build_s": time.perf_counter() - began, "widths": own.shape.widths}
    print(f"trie of {count:>10,} items, built in {found['build_s']:.1f} s; {rows} × {beams} beams", flush=True)
    wide = build(codes, sizes, at_least=dataclasses.replace(own.shape, widths=sizes))
    rng = np.random.default_rng(2)
    for level in range(1, len(sizes)):
        nodes = jnp.asarray(rng.integers(0, int(own.counts[...][level]), (rows, beams)), jnp.int32)
        logits = jnp.asarray(rng.standard_normal((rows, beams, sizes[level])), jnp.float32)
        scores = jnp.asarray(rng.standard_normal((rows, beams)), jnp.float32)
        times = [
            1e3 * seconds(functools.partial(constrained, ids, nodes, logits, scores, level), 21) for ids in (own, wide)
        ]
        free = 1e3 * seconds(functools.partial(unconstrained, logits, scores), 21)
        found[f"level_{level}_ms"] = {"own": times[0], "widest": times[1], "no_trie": free}
        print(
            f"  level {level}: {times[0]:.2f} ms of {own.shape.widths[level]} children, {times[1]:.2f} ms of "
            f"{sizes[level]}; without a trie {free:.2f} ms", flush=True,
        )  # fmt: skip
    return found


@functools.partial(jax.jit, static_argnames="level")
def constrained(ids: SemanticIDs, nodes: jax.Array, logits: jax.Array, scores: jax.Array, level: int) -> Any:
    """One step of the beam search behind the model: the best children and their scores."""
    labels, children = ids.step(level, nodes)
    gains = jnp.take_along_axis(jax.nn.log_softmax(logits), labels, axis=2)
    flat = jnp.where(children >= 0, scores[..., None] + gains, -jnp.inf).reshape(len(nodes), -1)
    best, places = jax.lax.top_k(flat, min(nodes.shape[1], flat.shape[1]))
    return best, jnp.take_along_axis(children.reshape(len(nodes), -1), places, axis=1)


@jax.jit
def unconstrained(logits: jax.Array, scores: jax.Array) -> Any:
    """The same over the whole alphabet."""
    return jax.lax.top_k((scores[..., None] + jax.nn.log_softmax(logits)).reshape(len(scores), -1), scores.shape[1])


if __name__ == "__main__":
    main()
