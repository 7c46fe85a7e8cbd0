"""The cheapest change that makes a configuration fit: tried, in the order of what it costs, not guessed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from efficientids.options import READS, TrainConfig
from efficientids.planning.candidates import Candidates, Need
from efficientids.systems.base import mesh_shape

Flags = dict[str, Any]


class Advice(NamedTuple):
    """A configuration that fits: the flags that lead to it, what they cost, and what it needs."""

    flags: Flags
    cost: str
    need: Need

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"flags": words(self.flags), "cost": self.cost, **self.need.to_json()}


class Change(NamedTuple):
    """What it costs, the flags it sets, and their values for an unresolved configuration (None: nothing to change)."""

    cost: str
    sets: frozenset[str]
    flags: Callable[[Candidates, TrainConfig, int], Flags | None]


def advise(
    candidates: Candidates, config: TrainConfig, devices: int, tried: Callable[[Flags, Need], None]
) -> Advice | None:
    """The cheapest change of an unresolved configuration with which it fits, else the cheapest sum of them.

    Of a sum each change is needed: without it, it would not fit.

    Args:
        tried: told of each configuration that was looked at.
    """
    search = _Search(candidates, config, devices, tried)
    applicable = [change for change in CHANGES if change.sets <= READS[config.recommender]]
    for change in applicable:
        found = search.sum_of([change])
        if found is not None and found.need.fits:
            return found
    for count in range(2, len(applicable) + 1):
        found = search.sum_of(applicable[:count])
        if found is not None and found.need.fits:
            return _without_the_needless(search, applicable[:count], found)
    return None


class _Search:
    """Sums of changes, each looked at once."""

    def __init__(
        self, candidates: Candidates, config: TrainConfig, devices: int, tried: Callable[[Flags, Need], None]
    ) -> None:
        self._candidates, self._config, self._devices, self._tried = candidates, config, devices, tried
        self._seen: set[TrainConfig] = {config}

    def sum_of(self, changes: Sequence[Change]) -> Advice | None:
        """What they come to; None if none of them changes anything. A micro-batch is chosen with all others made."""
        flags: Flags = {}
        costs = []
        for change in sorted(changes, key=lambda change: change.sets == _BATCH_FLAGS):
            more = change.flags(self._candidates, dataclasses.replace(self._config, **flags), self._devices)
            if more is not None:
                flags |= more
                costs.append(change.cost)
        if not flags:
            return None
        trial = dataclasses.replace(self._config, **flags)
        need = self._candidates.need(trial, self._devices)
        if trial not in self._seen:
            self._seen.add(trial)
            self._tried(flags, need)
        return Advice(flags, "; ".join(costs), need)


def _without_the_needless(search: _Search, changes: Sequence[Change], found: Advice) -> Advice:
    """The sum without changes, the dearest first, that the others make needless; the last one made it fit."""
    kept = list(changes)
    for change in reversed(changes[:-1]):
        fewer = [other for other in kept if other is not change]
        without = search.sum_of(fewer)
        if without is not None and without.need.fits:
            kept, found = fewer, without
    return found


def words(flags: Flags) -> list[str]:
    """As they are typed; a flag that is taken back (None) is left out."""
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items() if value is not None]


def _remat(candidates: Candidates, config: TrainConfig, devices: int) -> Flags | None:
    now = candidates.resolve(config).gradient_checkpointing
    return None if now == "full" else {"gradient_checkpointing": "full"}


_BATCH_FLAGS = frozenset({"batch_size", "batch_size_per_device", "gradient_accumulation"})


def _accumulate(candidates: Candidates, config: TrainConfig, devices: int) -> Flags | None:
    """The same step in smaller micro-batches: in the largest that fit, or the smallest that there are."""
    resolved = candidates.resolve(config)
    if resolved.pack_sequences:
        return None  # a packed row's histories are planned for the whole batch
    batch, times = resolved.batch_size or 1, resolved.gradient_accumulation
    sizes = [size for size in range(devices, batch, devices) if batch % size == 0]

    def split(size: int) -> Flags:
        return {
            "batch_size": size, "batch_size_per_device": None, "gradient_accumulation": times * batch // size,
        }  # fmt: skip

    def fits(size: int) -> bool:
        return candidates.need(dataclasses.replace(config, **split(size)), devices).fits

    return split(_last(sizes, fits)) if sizes else None


def _last(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The last of ascending `sizes` that fits, by bisection; the first, if none does."""
    low, high = 0, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low]


def _adapters(candidates: Candidates, config: TrainConfig, devices: int) -> Flags | None:
    return {"train": "lora"} if candidates.resolve(config).train == "full" else None


def _quantize(candidates: Candidates, config: TrainConfig, devices: int) -> Flags | None:
    resolved = candidates.resolve(config)
    return {"quantize": "nf4"} if resolved.train != "full" and resolved.quantize != "nf4" else None


def _fsdp(candidates: Candidates, config: TrainConfig, devices: int) -> Flags | None:
    """The smallest part of the model for each device."""
    now = mesh_shape(candidates.need(config, devices, False).config)
    return {"mesh": f"fsdp={devices}"} if now.tensor == 1 and now.fsdp < devices else None


CHANGES = (
    Change("the forward pass is computed twice", frozenset({"gradient_checkpointing"}), _remat),
    Change("the same step in smaller pieces, which keep less of the GPU busy", _BATCH_FLAGS, _accumulate),
    Change("adapters train in the Llama's place", frozenset({"train"}), _adapters),
    Change("every device gathers the weights of each layer", frozenset({"mesh"}), _fsdp),
    Change("the frozen weights lose precision, and are dequantised in every pass", frozenset({"quantize"}), _quantize),
)
"""The cheapest first."""
