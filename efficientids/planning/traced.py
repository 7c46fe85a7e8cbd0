"""What a traced step costs, read off its program: arithmetic, bytes that must move, and activations.

The walk sees the step as it was traced, with whatever recomputation, adapters, attention kernel or loss it has, so that
no formula has to be kept for each system. Nothing is compiled; XLA's own account replaces the estimate of activations.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# What leaves its result in memory. Everything else is taken to be fused into what reads it.
_HEAVY = frozenset({
    "dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated", "scan", "while", "cond", "gather",
    "scatter", "scatter-add", "scatter_add", "sort", "cumsum", "cummax", "dynamic_update_slice", "top_k",
})  # fmt: skip
# The same bytes seen otherwise.
_VIEWS = frozenset({"reshape", "squeeze", "expand_dims", "copy", "stop_gradient", "optimization_barrier"})
_ATTENTION = "dot_product_attention"


@dataclasses.dataclass
class Cost:
    """Of one step on all devices together.

    Attributes:
        flops_16: of products whose operands have 16 bits; a product of m × k and k × n counts 2 m k n.
        flops_32: of the other ones.
        scanned_bytes: read and written by scans, weights and kept activations of all layers: what caches cannot hold.
    """

    flops_16: float = 0.0
    flops_32: float = 0.0
    scanned_bytes: float = 0.0

    @property
    def flops(self) -> float:
        return self.flops_16 + self.flops_32

    def add(self, other: Cost, times: float = 1) -> None:
        """Adds `other`, so many times over."""
        self.flops_16 += other.flops_16 * times
        self.flops_32 += other.flops_32 * times
        self.scanned_bytes += other.scanned_bytes * times


def cost(program: ClosedJaxpr) -> Cost:
    """What one call of the program does.

    Of the branches of a condition the dearest counts (rows are taken to be full), of a loop without a known length one
    turn: both are true of what every full batch does at least.
    """
    return _cost(program.jaxpr)


def _cost(jaxpr: Jaxpr) -> Cost:
    total = Cost()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total.add(_product(eqn))
        elif name.startswith(_ATTENTION):
            total.add(_fused_attention(eqn, name))
        elif name == "cond":
            total.add(max((_cost(branch) for branch in _inner(eqn)), key=lambda c: c.flops))
        elif name == "scan":
            length = eqn.params["length"]
            fixed = eqn.params["num_consts"] + eqn.params["num_carry"]
            for body in _inner(eqn):
                total.add(_cost(body), length)
            total.scanned_bytes += _bytes(eqn.invars[fixed:]) + _bytes(eqn.outvars[eqn.params["num_carry"] :])
        else:
            for body in _inner(eqn):
                total.add(_cost(body))
    return total


def _product(eqn: Any) -> Cost:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval
    flops = 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left.shape[axis] for axis in contracted)
    return _at(flops, left.dtype)


def _fused_attention(eqn: Any, name: str) -> Cost:
    """cuDNN's kernel on q [B, T, N, H], k [B, S, K, H]: 2 products forward, 5 backward, half of each by causality."""
    q, k = eqn.invars[0].aval, eqn.invars[1].aval
    products = 5 if "bwd" in name else 2
    return _at(products * float(math.prod(q.shape)) * k.shape[1], q.dtype)


def _at(flops: float, dtype: Any) -> Cost:
    return Cost(flops_16=flops) if np.dtype(dtype).itemsize == 2 else Cost(flops_32=flops)


def fuses_attention(program: ClosedJaxpr) -> bool:
    """True where attention is cuDNN's kernel."""
    return any(eqn.primitive.name.startswith(_ATTENTION) for eqn in _everywhere(program.jaxpr))


def _everywhere(jaxpr: Jaxpr) -> Iterator[Any]:
    """The equations of a program and of all inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body in _inner(eqn):
            yield from _everywhere(body)


def activations(program: ClosedJaxpr) -> int:
    """Bytes alive at most that the program itself has made, gradients among them, beside its arguments: an estimate.

    A liveness analysis of the traced program under one rule: products, scans, gathers, scatters and sorts read and
    write memory, and everything between them is fused. XLA fuses less here and more there.
    """
    return _peak(program.jaxpr)


class _Op(NamedTuple):
    """An equation, with its variables as numbers that are unique across inlined calls."""

    eqn: Any
    reads: list[int]
    writes: list[int]


def _flat(jaxpr: Jaxpr, numbers: dict[Any, int], fresh: Iterator[int]) -> Iterator[_Op]:
    """The equations in order, calls (jit, remat, custom rules) replaced by what they call."""
    for eqn in jaxpr.eqns:
        bodies = [] if eqn.primitive.name in _HEAVY else list(_inner(eqn))
        if len(bodies) == 1 and len(bodies[0].invars) == len(eqn.invars):
            (body,) = bodies
            inner = {
                own: next(fresh) if isinstance(given, Literal) else numbers[given]
                for own, given in zip(body.invars, eqn.invars, strict=True)
            }
            inner |= {constant: next(fresh) for constant in body.constvars}
            yield from _flat(body, inner, fresh)
            for own, result in zip(eqn.outvars, body.outvars, strict=True):
                numbers[own] = next(fresh) if isinstance(result, Literal) else inner[result]
            continue
        reads = [numbers[v] for v in eqn.invars if not isinstance(v, Literal)]
        numbers.update((v, next(fresh)) for v in eqn.outvars)
        yield _Op(eqn, reads, [numbers[v] for v in eqn.outvars])


def _peak(jaxpr: Jaxpr) -> int:
    """The most bytes alive at a time among what the equations of `jaxpr` make."""
    fresh = itertools.count()
    numbers = {v: next(fresh) for v in (*jaxpr.invars, *jaxpr.constvars)}
    size: dict[int, int] = {}  # of every variable that was made here
    held: dict[int, frozenset[int]] = {}  # which arrays in memory a variable is computed from: itself, if it is one
    begins: list[list[int]] = []
    last: dict[int, int] = {}
    inside: list[int] = []
    for index, (eqn, reads, writes) in enumerate(_flat(jaxpr, numbers, fresh)):
        name = eqn.primitive.name
        heavy = name in _HEAVY or name.startswith(_ATTENTION)
        made: list[int] = []
        if heavy:
            # What was only computed so far has to be written for this one to read it.
            made = [v for v in reads if v in size and held[v] != {v} and v not in made]
            held.update((v, frozenset({v})) for v in made)
        sources = frozenset[int]().union(*(held.get(v, frozenset()) for v in reads))
        view = name in _VIEWS
        for number, v in zip(writes, eqn.outvars, strict=True):
            if not view:
                size[number] = _bytes([v])
            held[number] = frozenset({number}) if heavy else sources
        if heavy:
            made += writes
        last.update((v, index) for v in (*sources, *made))
        begins.append(made)
        inside.append(max((_peak(body) for body in _inner(eqn)), default=0) if heavy else 0)
    kept = {number for v in jaxpr.outvars if not isinstance(v, Literal) for number in held.get(numbers[v], ())}
    return _sweep(begins, inside, size, {v: end for v, end in last.items() if v not in kept})


def _sweep(begins: list[list[int]], inside: list[int], size: dict[int, int], last: dict[int, int]) -> int:
    """The largest sum of `size` over what has begun and not ended, with what an equation needs inside itself."""
    ends: dict[int, list[int]] = {}
    for v, index in last.items():
        ends.setdefault(index, []).append(v)
    alive = peak = 0
    for index, made in enumerate(begins):
        alive += sum(size[v] for v in made)
        peak = max(peak, alive + inside[index])
        alive -= sum(size[v] for v in ends.get(index, ()))
    return peak


def _inner(eqn: Any) -> Iterator[Jaxpr]:
    """The programs inside an equation."""
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one


def _bytes(variables: Sequence[Any]) -> int:
    """Of arrays; a random key's dtype has no size of its own, and counts as 8 bytes."""
    return sum(math.prod(v.aval.shape) * getattr(v.aval.dtype, "itemsize", 8) for v in variables)
