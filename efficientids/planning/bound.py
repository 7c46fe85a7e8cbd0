"""How fast a step could be at best: a roofline from its arithmetic, the bytes it moves and the link between GPUs."""

from __future__ import annotations

import dataclasses

from core.sharding import MeshShape
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


def bound(
    cost: Cost,
    trained_bytes: int,
    frozen_bytes: int,
    state_bytes: int,
    positions: int,
    device: Device,
    shape: MeshShape,
) -> Bound:
    """The bound of one step on a mesh.

    Args:
        cost: on all devices together.
        trained_bytes: parameters that train, whole; their gradients have as many.
        frozen_bytes: everything else that the step reads, whole.
        state_bytes: trained parameters and optimiser state, whole: read and written once a step, each part once.
        positions: of the batch.
    """
    compute = cost.flops_16 / device.matmul_flops + cost.flops_32 / (device.matmul_flops / 2)
    # Weights are read by every device, activations by the one that has them: counted as if all were split.
    moved = cost.scanned_bytes / shape.size + 2 * state_bytes / (shape.fsdp * shape.tensor)
    return Bound(
        compute=compute / shape.size,
        memory=moved / device.memory_bandwidth,
        link=passed_bytes(trained_bytes, frozen_bytes, shape) / device.link_bandwidth,
        flops=cost.flops,
        positions=positions,
    )


def passed_bytes(trained_bytes: int, frozen_bytes: int, shape: MeshShape) -> float:
    """Bytes that each device must pass on in a step, in rings.

    Over data gradients are summed (2 (n − 1) / n of them); over fsdp they are summed where each part stays, and weights
    are gathered for the forward and the backward pass (each (n − 1) / n), trained ones rounded to 2 bytes. What tensor
    sums in every layer is not counted: the bound stays one.
    """
    gathered = 2 * (frozen_bytes + trained_bytes / 2)
    over_fsdp = (trained_bytes + gathered) / shape.tensor * (shape.fsdp - 1) / shape.fsdp
    over_data = 2 * trained_bytes / (shape.tensor * shape.fsdp) * (shape.data - 1) / shape.data
    return over_fsdp + over_data
