"""Pretraining of an RQ-VAE on item vectors alone: AdamW over epochs of the catalogue, an epoch one compiled program.

Codebooks start from k-means of the untrained encoder's latents; after every epoch but the last, codes that no item has
move to where items are.

Legend: N items (1 … N; 0 is padding), B items a batch, S batches an epoch, I columns, d latent width, L levels, P items
of a pool.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from core.code_use import code_use
from core.functional import Buffer
from core.residual_kmeans import residual_kmeans
from core.residual_quantizer import count_codes
from core.rqvae import RQVAE
from efficientids.errors import UserError
from efficientids.log import duration
from efficientids.recommenders.base import Batch, LossSum, OptimizerConfig, Phase
from efficientids.tokenizing.settings import TokenizerSettings
from efficientids.training.step import Program, TrainState, build_program

SAMPLE = 2**16
"""Items whose latents k-means starts codebooks from, and onto which dead codes move: 256 for each of 256 codes."""

_LINES = 20  # said about an epoch, over all of them


class Pretraining(nnx.Module):
    """An RQ-VAE and the item vectors that it learns: a batch is then a row of item numbers."""

    def __init__(self, rqvae: RQVAE, vectors_NI: np.ndarray) -> None:
        self.rqvae = rqvae
        self.vectors_NI = Buffer(jnp.asarray(vectors_NI, jnp.float32))


def pretrain(
    vectors_NI: np.ndarray,
    settings: TokenizerSettings,
    say: Callable[[str], None],
    record: Callable[[dict[str, Any]], None],
) -> RQVAE:
    """An RQ-VAE of a catalogue's standardised vectors float32 [N + 1, I].

    Args:
        say: told a line now and then, with the time left.
        record: told a row an epoch: losses; use, perplexity and collisions by level; how many codes were revived.

    Raises:
        UserError: the loss is no number any more.
    """
    model = _at_start(vectors_NI, settings)
    phase = _phase(len(vectors_NI) - 1, settings)
    program = build_program(model, phase, accumulation=1, grad_clip=settings.grad_clip, donate=False)
    key = jax.random.key(settings.seed)
    run_epoch, look = _programs(program, settings)
    batches, state, began = phase.batches(settings.seed, 0), program.state, time.perf_counter()
    for epoch in range(1, settings.epochs + 1):
        stacked = _stacked([next(batches) for _ in range(int(phase.steps_per_epoch))])
        state, metrics = run_epoch(state, program.frozen, stacked, key)
        # Without the last batch's padding: no code belongs where the padding's vector is.
        pool_P = stacked["items"][stacked["items"] > 0][:SAMPLE]
        codes_NL, revived_L, moved = look(state, program.frozen, pool_P, jax.random.fold_in(key, epoch))
        last = epoch == settings.epochs
        state = state if last else moved
        row = _row(epoch, metrics, np.asarray(codes_NL), [0] * len(settings.levels) if last else revived_L, settings)
        record(row)
        if epoch % max(1, settings.epochs // _LINES) == 0 or last:
            eta = (settings.epochs - epoch) * (time.perf_counter() - began) / epoch
            say(f"epoch {epoch}/{settings.epochs}  {in_words(row)}  ETA {duration(eta)}")
        if not math.isfinite(row["loss"]):
            raise UserError(f"the RQ-VAE's loss is {row['loss']} in epoch {epoch}; lower --learning_rate")
    trained = program.model(state)
    assert isinstance(trained, Pretraining)
    return trained.rqvae


def in_words(row: dict[str, Any]) -> str:
    """An epoch's row in a line."""
    used = "/".join(f"{share:.0%}" for share in row["used"])
    perplexity = "/".join(f"{value:.0f}" for value in row["perplexity"])
    return (
        f"loss {row['loss']:.4g} (reconstruction {row['reconstruction']:.4g})  codes used {used}  perplexity "
        f"{perplexity}  collisions {row['collisions'][-1]:.2%}  revived {sum(row['revived'])}"
    )


def _at_start(vectors_NI: np.ndarray, settings: TokenizerSettings) -> Pretraining:
    """Random encoder and decoder; codebooks that k-means finds among their latents of a sample."""
    key_start, key_kmeans = jax.random.split(jax.random.key(settings.seed))
    rqvae = jax.jit(lambda key: RQVAE(settings.rqvae(vectors_NI.shape[1]), key))(key_start)
    rows = sample(len(vectors_NI) - 1, settings.seed)
    latents_Pd = rqvae.encoder(jnp.asarray(vectors_NI[rows]))
    rqvae.quantizer.replace(residual_kmeans(latents_Pd, settings.levels, key_kmeans))
    return Pretraining(rqvae, vectors_NI)


def sample(num_items: int, seed: int) -> np.ndarray:
    """Up to `SAMPLE` items of 1 … N, in order."""
    if num_items <= SAMPLE:
        return np.arange(1, num_items + 1)
    return np.sort(np.random.default_rng(seed).choice(num_items, SAMPLE, replace=False)) + 1


def _phase(num_items: int, settings: TokenizerSettings) -> Phase:
    """The optimisation as the step and its clipping know it."""
    rows = min(settings.batch_size, num_items)
    steps = math.ceil(num_items / rows)

    def batches(seed: int, start_step: int) -> Iterator[Batch]:
        epoch, step = divmod(start_step, steps)
        while True:
            order = np.zeros(steps * rows, np.int32)  # behind the items padding, of weight 0
            order[:num_items] = np.random.default_rng((seed, epoch)).permutation(num_items) + 1
            for items in order.reshape(steps, rows)[step:]:
                yield {"items": items, "weights": (items > 0).astype(np.float32)}
            epoch, step = epoch + 1, 0

    shapes = {name: jax.ShapeDtypeStruct((rows,), dtype) for name, dtype in (("items", np.int32), ("weights", "f4"))}
    adam = OptimizerConfig(settings.learning_rate, weight_decay=settings.weight_decay)
    return Phase(
        "rqvae", [(nnx.Param, adam)], [shapes], batches, _loss, num_steps=settings.epochs * steps, steps_per_epoch=steps
    )


def _loss(model: Pretraining, batch: Batch, key: jax.Array, step: jax.Array) -> LossSum:
    """Σ over a batch's items of reconstruction + quantisation."""
    weights_B = batch["weights"]
    found = model.rqvae(model.vectors_NI[...][batch["items"]])
    count = jnp.sum(weights_B)
    parts = {
        "reconstruction": (jnp.sum(found.reconstruction_loss_B * weights_B), count),
        "quantization": (jnp.sum(found.quantization_loss_B * weights_B), count),
    }
    return LossSum(jnp.sum(found.loss_B * weights_B), count, count, parts)


def _programs(program: Program, settings: TokenizerSettings) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(an epoch; a look at the whole catalogue's codes, with the state whose dead codes are revived)."""

    @jax.jit
    def run_epoch(state: TrainState, frozen: nnx.State, batches: Batch, key: jax.Array) -> Any:
        return jax.lax.scan(lambda s, batch: program.step(s, frozen, batch, key), state, batches)

    @jax.jit
    def look(state: TrainState, frozen: nnx.State, pool_P: jax.Array, key: jax.Array) -> Any:
        model = nnx.merge(program.graphdef, *state.params, frozen)
        vectors_NI = model.vectors_NI[...]
        codes_NL = model.rqvae.codes(vectors_NI[1:])
        counts = count_codes(codes_NL, settings.levels)
        latents_Pd = model.rqvae.encoder(vectors_NI[pool_P])
        revived_L = model.rqvae.quantizer.revive(counts, latents_Pd, key)
        params, _ = nnx.state(model, *program.filters, ...)
        return codes_NL, revived_L, state._replace(params=(params,))

    return run_epoch, look


def _stacked(batches: list[Batch]) -> dict[str, np.ndarray]:
    """[S, B] of each array."""
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def _row(epoch: int, metrics: Any, codes_NL: np.ndarray, revived_L: Any, settings: TokenizerSettings) -> dict[str, Any]:
    """What is recorded of an epoch; means over its items."""
    items_S = np.asarray(metrics["targets"], np.float64)
    means = {
        name: float(np.average(np.asarray(metrics[name], np.float64), weights=items_S))
        for name in ("loss", "reconstruction", "quantization", "grad_norm")
    }
    use = {name: value.tolist() for name, value in code_use(codes_NL, settings.levels)._asdict().items()}
    return {"event": "epoch", "epoch": epoch, **means, **use, "revived": np.asarray(revived_L).tolist()}
