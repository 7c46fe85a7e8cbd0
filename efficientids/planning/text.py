"""The lines of a plan."""

from __future__ import annotations

from typing import Any

from core.attention import cudnn_version
from efficientids.options import READS
from efficientids.planning.advice import Advice, Flags, words
from efficientids.planning.candidates import Need
from efficientids.planning.devices import GIB, Device
from efficientids.planning.search import Largest


def gib(size: int) -> str:
    """Bytes as GiB, below a tenth of one as MiB, with two digits."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 or size == 0 else f"{size / 2**20:,.2f} MiB"


def parts(need: Need, headline: str, device: str) -> str:
    """What is planned, and its parts."""
    estimate, config = need.estimate, need.config
    batch, mesh = f"{config.batch_size} × {config.seq_len} positions at a time", ""
    if need.devices > 1:
        mesh = f" as {config.mesh}"
    if config.gradient_accumulation > 1:
        batch += f", {config.gradient_accumulation} times a step"
    lines = [
        f"{config.recommender}: {headline}",
        f"{need.devices} × {device}{mesh}, {batch}; {estimate.num_items:,} items; {estimate.parameters:,} parameters, "
        f"{estimate.trained_parameters:,} of them trained",
        "",
        "on each device" if need.devices > 1 else "on the device",
    ]
    lines += [f"  {name:<24}{gib(size):>14}{size:>20,} bytes" for name, size in estimate.parts.items() if size]
    lines.append(f"  {'total':<24}{gib(estimate.total):>14}{estimate.total:>20,} bytes")
    return "\n".join(lines) + "\n"


def verdict(need: Need) -> str:
    """XLA's account, the pool, the verdict and the bound."""
    pool, compiled = need.pool, need.compiled
    lines = []
    if compiled is not None:
        lines += [
            f"compiled for it, {attention(need)}:",
            f"  arguments {gib(compiled.arguments)} + outputs {gib(compiled.outputs)} − aliased "
            f"{gib(compiled.aliased)} + temporaries {gib(compiled.temporaries)} = {gib(compiled.peak)} at the peak",
        ]
    lines.append(
        f"pool: {gib(pool.memory)} × {pool.fraction:g} − {gib(pool.reserve)} in reserve (autotuning, libraries, gaps) "
        f"= {gib(pool.size)}"
    )
    basis = (
        ""
        if compiled is not None
        else ", by the estimate above and a quarter more for activations: nothing was compiled"
    )
    if need.fits:
        lines.append(f"FITS: {gib(need.peak)} of {gib(pool.size)} ({need.peak / pool.size:.0%}){basis}")
    elif _hopeless(need):
        lines.append(f"DOES NOT FIT: {gib(need.estimate.exact)} without any activation, {gib(pool.size)} in the pool")
    else:
        lines.append(f"DOES NOT FIT: {gib(need.peak)}, {gib(need.peak - pool.size)} more than the pool{basis}")
    if need.bound is not None:
        limit = need.bound
        lines += [
            f"not faster than {limit.seconds * 1e3:,.3g} ms a step, {limit.positions / limit.seconds:,.0f} positions/s "
            "(a bound, no forecast):",
            f"  {limit.flops / 1e12:,.1f} TFLOP at the data sheet's peak {limit.compute * 1e3:,.3g} ms, memory "
            f"{limit.memory * 1e3:,.3g} ms, link {limit.link * 1e3:,.3g} ms",
        ]
    return "\n".join(lines) + "\n"


def attention(need: Need) -> str:
    """Which kernel of attention the plan is for, and what a plan for the other one takes."""
    if need.cudnn:
        return "with cuDNN's attention"
    may = "attention" in READS[need.config.recommender] and need.config.attention == "auto"
    if may and need.config.precision == "bfloat16" and not need.config.pack_sequences and cudnn_version() is None:
        how = "pip install --no-deps nvidia-cudnn-cu12"
        return f"with XLA's attention (a GPU takes cuDNN's, which needs less; to plan it: {how})"
    return "with XLA's attention"


def _hopeless(need: Need) -> bool:
    """True where what no program makes smaller is too large already."""
    return need.estimate.exact > need.pool.size


def measured(found: dict[str, Any], need: Need, device: Device) -> str:
    """Three real steps against the plan; a plan for another card is nothing to compare them with."""
    peak = found["peak_bytes"]
    against = f"the plan says {gib(need.peak)} ({need.peak / peak - 1:+.1%})"
    if not device.is_card(found["device"]):
        against = f"the plan is for another card ({device.name}): give the --device that is here to compare them"
    return (
        f"measured on {found['device']}: peak {gib(peak)} in {found['steps']} steps, {against}; "
        f"the last step took {found['step_seconds'] * 1e3:,.3g} ms\n"
    )


def devices_head(device: Device) -> str:
    """The head of the table of device counts."""
    peers = "" if device.peer_to_peer else ", through the host's memory"
    return f"by the number of devices, each with its rows of the batch ({device.link}{peers})"


def device_row(need: Need) -> str:
    """A line of the table of device counts."""
    speed = "" if need.bound is None else f"not faster than {need.bound.seconds * 1e3:,.3g} ms a step"
    mesh = need.config.mesh if need.devices > 1 else ""
    return f"  {need.devices}  {mesh:<16}--batch_size {need.config.batch_size:<6}{_short(need):<36}{speed}".rstrip()


def _short(need: Need) -> str:
    if _hopeless(need):
        return f"does not fit: over {gib(need.estimate.exact)} each"
    return f"{'fits' if need.fits else 'does not fit'}: {gib(need.peak)} each"


def no_batch(asked: Need) -> str:
    """Where not even an empty batch fits."""
    return f"largest batch: none; parameters, gradients and optimiser alone take {gib(asked.estimate.exact)}"


def largest(found: Largest, users: int) -> str:
    """The end of the search for a batch size, of at most so many users."""
    if not found.value:
        return f"largest batch: none; --batch_size {found.too_large} is too large already"
    over = (
        f"; none larger was tried, for {users:,} users"
        if found.too_large is None
        else f"; {found.too_large} is too large"
    )
    return f"largest batch that fits: --batch_size {found.value} ({gib(found.peak)}){over}"


def tried(flags: Flags, need: Need) -> str:
    """A line of the search for advice."""
    return f"  tried {' '.join(words(flags))}: {_short(need)}"


def advice(found: Advice | None) -> str:
    """The end of the search for advice."""
    if found is None:
        return "nothing that was tried fits: a smaller --llama_size, a shorter --seq_len, or a larger --device"
    return f"fits with {' '.join(words(found.flags))}: {gib(found.need.peak)} ({found.cost})"
