"""`--estimate_memory_only`: will it fit, how large a batch, what else to try, how fast at best; without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any

from efficientids.options import TrainConfig
from efficientids.planning import devices, gpu, measure, text
from efficientids.planning.advice import Flags, advise
from efficientids.planning.candidates import Candidates, Need, Target
from efficientids.planning.devices import Device, Pool
from efficientids.planning.search import largest
from efficientids.systems.base import Scale, System, mesh_shape

NOTHING_FITS = 3
"""The exit code where neither the configuration nor any change that was tried fits."""

DEVICE_COUNTS = (1, 2, 4, 8)


def plan(config: TrainConfig, system: System, scale: Scale) -> int:
    """Prints the plan of an unresolved configuration as it is found, or as one JSON object at the end.

    Returns:
        The exit code.

    Raises:
        UserError: an unknown device, flags that training would refuse, no CUDA plugin with `--plan_by compiler`, no
            GPU with `--plan_by run`.
    """
    say: Callable[[str], None] = (lambda _: None) if config.json else (lambda line: print(line, flush=True))
    began = time.perf_counter()
    device = devices.find(config.device)
    found = Planning(config, device, Candidates(system, scale, _target(config, device)), say).run()
    found["seconds"] = round(time.perf_counter() - began, 1)
    if config.json:
        print(json.dumps(found, indent=2))
    elsewhere = any(row["fits"] for row in found.get("devices", ()))
    return 0 if found["fits"] or found.get("advice") or elsewhere else NOTHING_FITS


def _target(config: TrainConfig, device: Device) -> Target:
    if config.plan_by == "compiler" and not gpu.plugin_installed():
        gpu.described(device, 1)  # says what is missing
    compiles = config.plan_by != "estimate" and gpu.plugin_installed()
    fraction = devices.fraction()
    return Target(
        name=device.target_config(),
        pool=lambda count: Pool.of(device.memory_bytes, fraction, count),
        devices=functools.partial(gpu.described, device) if compiles else None,
        facts=device,
    )


class Planning:
    """One plan: the verdict first, then what takes more compilations."""

    def __init__(self, config: TrainConfig, device: Device, candidates: Candidates, say: Callable[[str], None]) -> None:
        self._asked, self._device, self._candidates, self._say = config, device, candidates, say
        self._count = config.num_devices

    def run(self) -> dict[str, Any]:
        """Everything that was found, as plain values; what is said on the way is the same in words."""
        asked, candidates, say = self._asked, self._candidates, self._say
        estimated = candidates.need(asked, self._count, False)
        mode = candidates.system.mode(asked, estimated.config)
        if mode is not None:
            say(mode)
        say(text.parts(estimated, candidates.system.headline(estimated.config), self._device.name))
        need = candidates.need(asked, self._count)
        say(text.verdict(need))
        found = self._facts(need)
        if asked.plan_by == "run":
            found["measured"] = measure.three_steps(asked)
            say(text.measured(found["measured"], need, self._device))
        if asked.quick:
            return found
        found["devices"] = self._device_counts(need)
        found["largest_batch"] = self._largest_batch(need)
        if not need.fits:
            found["advice"] = self._advice()
        return found

    def _facts(self, need: Need) -> dict[str, Any]:
        config = need.config
        return {
            "recommender": config.recommender,
            "model": self._candidates.system.headline(config),
            "mode": self._candidates.system.mode(self._asked, config),
            "device": dataclasses.asdict(self._device),
            "estimate": need.estimate.to_json(),
            "compiled": None if need.compiled is None else {
                **dataclasses.asdict(need.compiled), "peak": need.compiled.peak
            },
            "pool": {**dataclasses.asdict(need.pool), "size": need.pool.size},
            **need.to_json(),
            "bound": None if need.bound is None else need.bound.to_json(),
        }  # fmt: skip

    def _device_counts(self, asked: Need) -> list[dict[str, Any]]:
        """The same batch on 1, 2, 4 and 8 devices; where it does not split, the next one that does."""
        rows = []
        batch = asked.config.batch_size or 1
        self._say(text.devices_head(self._device))
        for count in DEVICE_COUNTS:
            # A mesh that was asked for is one of the devices asked for: the others choose their own.
            config = dataclasses.replace(self._with_batch(-(-batch // count) * count), mesh="auto")
            need = asked if count == self._count else self._candidates.need(config, count)
            rows.append(need.to_json())
            self._say(text.device_row(need))
        return rows

    def _with_batch(self, size: int) -> TrainConfig:
        return dataclasses.replace(self._asked, batch_size=size, batch_size_per_device=None)

    def _largest_batch(self, asked: Need) -> dict[str, Any] | None:
        """The largest --batch_size that fits on the number of devices asked for."""
        if asked.estimate.exact > asked.pool.size:
            self._say(text.no_batch(asked))
            return None

        def peak(size: int) -> int:
            return self._candidates.need(self._with_batch(size), self._count).peak

        # A batch holds no user twice: a larger one would be empty rows.
        users = int((self._candidates.scale.train_lengths >= 2).sum())
        unit = mesh_shape(asked.config).batch_shards
        found = largest(peak, asked.pool.size, asked.config.batch_size or 1, unit=unit, most=users)
        self._say(text.largest(found, users))
        return dataclasses.asdict(found)

    def _advice(self) -> dict[str, Any] | None:
        self._say("what would fit:")

        def tried(flags: Flags, need: Need) -> None:
            self._say(text.tried(flags, need))

        found = advise(self._candidates, self._asked, self._count, tried)
        self._say(text.advice(found))
        return None if found is None else found.to_json()
