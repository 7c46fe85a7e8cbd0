"""A run on a GPU: refused before its weights load where its step cannot fit, and its real peak against the plan's."""

from __future__ import annotations

import jax

from efficientids.errors import UserError
from efficientids.log import RunLog
from efficientids.options import TrainConfig
from efficientids.planning.advice import advise, words
from efficientids.planning.candidates import Candidates, Target
from efficientids.planning.devices import INSIDE_BYTES, Pool
from efficientids.planning.measure import peak_bytes
from efficientids.planning.text import gib
from efficientids.systems.base import Scale, System, mesh_shape


def predicted_peak(config: TrainConfig, system: System, scale: Scale) -> int | None:
    """Bytes that the step will hold on each GPU of the run, by XLA's account.

    Args:
        config: unresolved, but for its mesh.

    The step is compiled, and no array made. None on a CPU, where nothing is checked, and for what does not train.

    Raises:
        UserError: they are more than the GPU's pool, with what would fit; `--force` starts all the same.
    """
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform == "gpu" else None
    if limit is None or not system.planned(system.resolve(config, scale), scale).plan():
        return None
    shape = mesh_shape(config)
    return _checked(config, Candidates(system, scale, _at_hand(device, limit)), shape.size)


def _at_hand(device: jax.Device, limit: int) -> Target:
    """The GPU of this process, whose pool is `limit` bytes."""
    return Target(
        name=device.device_kind,
        pool=lambda _: Pool(limit, 1.0, INSIDE_BYTES),
        devices=lambda count: jax.devices()[:count],
        facts=None,
    )


def _checked(config: TrainConfig, candidates: Candidates, devices: int) -> int:
    need = candidates.need(config, devices)
    if need.fits or config.force:
        return need.peak
    found = advise(candidates, config, devices, lambda flags, tried: None)
    instead = "nothing that was tried fits; take a smaller --llama_size or a shorter --seq_len"
    if found is not None:
        instead = f"it fits with {' '.join(words(found.flags))} ({gib(found.need.peak)}; {found.cost})"
    raise UserError(
        f"a training step needs {gib(need.peak)} on {candidates.target.name}, where {gib(need.pool.size)} can be had: "
        f"{instead}; --force starts all the same"
    )


def log_peak(predicted: int | None, log: RunLog) -> None:
    """Says what the plan said and what the run came to; nothing without a prediction."""
    peaks = [peak for device in jax.local_devices() if (peak := peak_bytes(device)) is not None]
    if predicted is None or not peaks:
        return
    real = max(peaks)
    log.record({"event": "memory", "predicted_bytes": predicted, "peak_bytes": real})
    log.say(
        f"memory: the plan said {gib(predicted)} for a step, the run came to {gib(real)} at its peak"
        f"{', on the fullest device' if len(peaks) > 1 else ''}, evaluation and saving included"
    )
