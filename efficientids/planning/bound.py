"""How fast a step could be at best: a roofline from its arithmetic, the bytes it moves and the link between GPUs."""

from __future__ import annotations

import dataclasses

from efficientids.planning.devices import Device
from efficientids.planning.traced import Cost


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that a step takes at least, one by one: they may overlap, so the longest is the bound.

    Attributes:
        compute: products at the data sheet's dense peak.
        memory: weights, kept activations and optimiser state through the memory's bandwidth, once each time they are
            needed.
        link: what the GPUs must tell each other.
        flops: of the step, on all devices together.
        positions: of the batch, padding included.
    """

    compute: float
    memory: float
    link: float
    flops: float
    positions: int

    @property
    def seconds(self) -> float:
        """No step is faster than this."""
        return max(self.compute, self.memory, self.link)

    def to_json(self) -> dict[str, float | int | str]:
        """Plain values; seconds."""
        return {
            **dataclasses.asdict(self), "seconds": self.seconds, "positions_per_s": self.positions / self.seconds,
            "meaning": "a bound: no step is faster",
        }  # fmt: skip


def bound(cost: Cost, state_bytes: int, gradient_bytes: int, positions: int, device: Device, devices: int) -> Bound:
    """The bound of one step with its rows split over `devices`.

    Args:
        cost: on all devices together.
        state_bytes: trained parameters and optimiser state on each device: read and written once a step.
        gradient_bytes: on each device; a ring passes 2 (n − 1) / n of them through every link.
        positions: of the batch.
    """
    compute = cost.flops_16 / device.matmul_flops + cost.flops_32 / (device.matmul_flops / 2)
    # Weights are read by every device, activations by the one that has them: counted as if all were split.
    moved = cost.scanned_bytes / devices + 2 * state_bytes
    passed = 2 * gradient_bytes * (devices - 1) / devices
    return Bound(
        compute=compute / devices,
        memory=moved / device.memory_bandwidth,
        link=passed / device.link_bandwidth,
        flops=cost.flops,
        positions=positions,
    )
