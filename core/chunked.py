"""Σ over chunks of a loss, with the gradients taken chunk by chunk in the forward pass.

Legend: T rows, n chunks, m rows a chunk.

A loss over T rows and N classes makes a [T, N] array of logits, and reverse mode keeps it until the backward pass.
Here each chunk's gradient is taken as soon as its loss is known, so one chunk of logits is alive at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

CHUNK_ELEMENTS = 2**25
"""Elements of a chunk's largest temporary (logits, gathered vectors) at most, by default: 128 MiB in float32. Its
gradient takes as much again."""

CPU_CHUNK_ELEMENTS = 2**20
CPU_CHUNK_ROWS = 256
"""On a CPU a chunk that stays in cache is faster: of T = 12,800, N = 3,417, D = 64, loss and gradients took 0.14 s with
2**20 elements and 0.25 s with 2**25 (2 cores). Below some 256 rows the gradient of a large table, read and written
once a chunk, costs more than that saves."""

LossFn = Callable[[Any, Any], jax.Array]
Empty = Callable[[Any], jax.Array] | None


def chunked_sum(
    loss_fn: LossFn, params: Any, xs: Any, *, chunk_size: int, empty: Callable[[Any], jax.Array] | None = None
) -> jax.Array:
    """Σ over chunks of `loss_fn(params, x_chunk)`, holding the temporaries of one chunk at a time.

    Args:
      loss_fn: (params, x_chunk) → scalar, a sum over the chunk's rows. It must not close over traced arrays: they would
        be constants of the custom rule. Pass them in `params`.
      params: pytree of arrays that every chunk sees whole. Integer and boolean leaves are constants.
      xs: pytree of arrays [T, ...] that are cut into chunks. Integer and boolean leaves are constants.
      chunk_size: rows of a chunk at most; static.
      empty: x_chunk → whether the chunk's loss and gradients are zero whatever the parameters: it is then not computed.

    Returns:
      A float32 scalar. Under `jax.grad` the gradients of `params` are summed in float32 (each chunk's own gradient has
      the leaf's dtype: pass float32 masters and cast inside `loss_fn` to lose nothing) and returned in the leaf's
      dtype. Only leaves that are being differentiated cost anything: a frozen table has no gradient product.
      Reverse mode only, and once: there is no forward mode and no second derivative.

    Raises:
      ValueError: `chunk_size` < 1, no array in `xs`, or leading axes that differ.
    """
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(xs)}
    if chunk_size < 1:
        raise ValueError(f"chunked_sum: chunk_size is {chunk_size}; give at least 1")
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            f"chunked_sum: the leaves of xs have leading axes {sorted(map(str, lengths))}; give one length"
        )
    return _chunked_sum(loss_fn, chunk_size, empty, params, xs)


def chunk_rows(row_elements: int, chunk_elements: int | None) -> int:
    """Rows of a chunk whose rows hold `row_elements` elements each: at least 1, and `chunk_elements` in all at most.

    None means the default for `jax.default_backend()`: `CHUNK_ELEMENTS`, on a CPU less. Whoever compiles on a CPU for
    another device passes a number.
    """
    if chunk_elements is None:
        rows = CHUNK_ELEMENTS // row_elements
        if jax.default_backend() == "cpu":
            rows = min(rows, max(CPU_CHUNK_ELEMENTS // row_elements, CPU_CHUNK_ROWS))
    else:
        rows = chunk_elements // row_elements
    return max(1, rows)


def num_chunks(rows: int, chunk_size: int) -> int:
    """The number n of equal chunks of at most `chunk_size` rows that `rows` are cut into.

    The smallest n that divides `rows`, if one lies below twice the least possible; else the least possible, and the
    rows left over make a chunk of their own.
    """
    least = max(1, -(-rows // chunk_size))
    return next((n for n in range(least, 2 * least) if rows % n == 0), least)


def _cut(xs: Any, chunk_size: int) -> tuple[Any, Any | None]:
    """xs [T, ...] → (stacked chunks [n, m, ...], the T mod n rows left over or None).

    Chunk i takes rows i, n + i, 2n + i, …: where T is sharded over devices batch-major, each device owns a contiguous
    range of T, and a contiguous chunk would lie on a few devices and leave the others idle. Strided, every chunk has
    rows of every device, and the reshape [T] → [m, n] moves nothing between them.
    """
    rows = jax.tree.leaves(xs)[0].shape[0]
    n = num_chunks(rows, chunk_size)
    m = rows // n
    stacked = jax.tree.map(lambda x: jnp.moveaxis(x[: m * n].reshape(m, n, *x.shape[1:]), 1, 0), xs)
    rest = jax.tree.map(lambda x: x[m * n :], xs) if m * n < rows else None
    return stacked, rest


def gathered(order_T: jax.Array, chunk_size: int) -> jax.Array:
    """`order_T` rearranged so that each chunk of `_cut` takes consecutive entries of it."""
    rows = order_T.shape[0]
    n = num_chunks(rows, chunk_size)
    m = rows // n
    return jnp.concatenate([order_T[: n * m].reshape(n, m).T.ravel(), order_T[n * m :]])


def _uncut(stacked: jax.Array, rest: jax.Array | None) -> jax.Array:
    """The inverse of `_cut` for one array."""
    n, m = stacked.shape[:2]
    main = jnp.moveaxis(stacked, 0, 1).reshape(n * m, *stacked.shape[2:])
    return main if rest is None else jnp.concatenate([main, rest])


def _scan(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, stacked: Any) -> tuple[Any, Any]:
    """`lax.scan`, but straight-line for a single chunk, so that XLA can fuse it with its surroundings."""
    if jax.tree.leaves(stacked)[0].shape[0] > 1:
        return jax.lax.scan(body, carry, stacked)
    carry, out = body(carry, jax.tree.map(lambda x: x[0], stacked))
    return carry, jax.tree.map(lambda x: x[None], out)


def _skipping(empty: Empty, x: Any, body: Callable[[Any], Any], carry: Any, otherwise: Callable[[Any], Any]) -> Any:
    """body(carry), or otherwise(carry) for an empty chunk, which then costs nothing."""
    return body(carry) if empty is None else jax.lax.cond(empty(x), otherwise, body, carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked_sum(loss_fn: LossFn, chunk_size: int, empty: Empty, params: Any, xs: Any) -> jax.Array:
    def body(total: jax.Array, x: Any) -> tuple[jax.Array, None]:
        def add(total: jax.Array) -> jax.Array:
            return total + loss_fn(params, x).astype(jnp.float32)

        return _skipping(empty, x, add, total, lambda total: total), None

    stacked, rest = _cut(xs, chunk_size)
    total, _ = _scan(body, jnp.float32(0), stacked)
    return total if rest is None else body(total, rest)[0]


def _forward(loss_fn: LossFn, chunk_size: int, empty: Empty, params: Any, xs: Any) -> tuple[jax.Array, Any]:
    """The sum, and as residuals the gradients of the perturbed leaves (None for the others)."""
    param_leaves, param_tree = jax.tree.flatten(params)
    x_leaves, x_tree = jax.tree.flatten(xs)
    values = [leaf.value for leaf in param_leaves]
    learned = [i for i, leaf in enumerate(param_leaves) if leaf.perturbed]
    moved = [i for i, leaf in enumerate(x_leaves) if leaf.perturbed]

    def body(carry: Any, x: list[jax.Array]) -> tuple[Any, list[jax.Array]]:
        def chunk_loss(param_part: list[jax.Array], x_part: list[jax.Array]) -> jax.Array:
            full_params = jax.tree.unflatten(param_tree, _put(values, learned, param_part))
            return loss_fn(full_params, jax.tree.unflatten(x_tree, _put(x, moved, x_part))).astype(jnp.float32)

        def add(carry: Any) -> tuple[Any, list[jax.Array]]:
            total, sums = carry
            loss, (param_grads, x_grads) = jax.value_and_grad(chunk_loss, argnums=(0, 1))(
                [values[i] for i in learned], [x[i] for i in moved]
            )
            return (total + loss, [s + g.astype(jnp.float32) for s, g in zip(sums, param_grads, strict=True)]), x_grads

        def nothing(carry: Any) -> tuple[Any, list[jax.Array]]:
            return carry, [jnp.zeros_like(x[i]) for i in moved]

        return _skipping(empty, jax.tree.unflatten(x_tree, x), add, carry, nothing)

    stacked, rest = _cut([leaf.value for leaf in x_leaves], chunk_size)
    zeros = [jnp.zeros(values[i].shape, jnp.float32) for i in learned]
    carry, x_grads = _scan(body, (jnp.float32(0), zeros), stacked)
    rest_grads: Sequence[jax.Array | None] = [None] * len(moved)
    if rest is not None:
        carry, rest_grads = body(carry, rest)
    total, sums = carry
    param_out = [s.astype(values[i].dtype) for i, s in zip(learned, sums, strict=True)]
    x_out = [_uncut(g, r) for g, r in zip(x_grads, rest_grads, strict=True)]
    none_params: list[jax.Array | None] = [None] * len(param_leaves)
    none_xs: list[jax.Array | None] = [None] * len(x_leaves)
    residuals = (
        jax.tree.unflatten(param_tree, _put(none_params, learned, param_out)),
        jax.tree.unflatten(x_tree, _put(none_xs, moved, x_out)),
    )
    return total, residuals


def _backward(loss_fn: LossFn, chunk_size: int, empty: Empty, residuals: Any, g: Any) -> Any:
    """Scales the gradients that the forward rule took."""
    if isinstance(g, SymbolicZero):
        return jax.tree.map(jnp.zeros_like, residuals)
    return jax.tree.map(lambda grad: (g * grad.astype(jnp.float32)).astype(grad.dtype), residuals)


def _put(values: list[Any], places: list[int], parts: list[Any]) -> list[Any]:
    """A copy of `values` with `parts` at `places`."""
    out = list(values)
    for place, part in zip(places, parts, strict=True):
        out[place] = part
    return out


# symbolic_zeros tells the forward rule which leaves are differentiated at all, so frozen ones cost nothing.
_chunked_sum.defvjp(_forward, _backward, symbolic_zeros=True)
