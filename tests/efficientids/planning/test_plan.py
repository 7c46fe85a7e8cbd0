"""The plan as a whole, with a compiler that is made up: verdict, order, advice, exit code; and the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from core.sharding import MeshShape
from efficientids import __main__, systems
from efficientids.errors import UserError
from efficientids.options import TrainConfig
from efficientids.planning import cli, gpu, plan, start
from efficientids.planning.advice import advise, words
from efficientids.planning.bound import bound
from efficientids.planning.candidates import Candidates, Need
from efficientids.planning.devices import DEVICES, GIB, Pool
from efficientids.planning.gpu import CompiledMemory
from efficientids.planning.memory import ACTIVATIONS, Estimate
from efficientids.planning.traced import Cost
from efficientids.systems.base import Scale
from tests.efficientids.planning.targets import gpu_target, need_plugin

SCALE = Scale(num_items=50)
TINY = TrainConfig(seq_len=16, batch_size=8)


class Invented(Candidates):
    """Candidates whose peaks follow a formula instead of a compiler."""

    def __init__(self, peak: Callable[[TrainConfig], int]) -> None:
        super().__init__(systems.get("efficientids"), SCALE, gpu_target(compiles=False))
        self._peak = peak
        self.asked: list[TrainConfig] = []
        self.need: Any = self._invented

    def _invented(self, config: TrainConfig, devices: int = 1, compiled: bool = True) -> Need:
        resolved = self.resolve(config)
        if compiled:
            self.asked.append(resolved)
        memory = CompiledMemory(self._peak(resolved), 0, 0, 0)
        estimate = Estimate({"everything": 1, ACTIVATIONS: 2}, 3, 3, 50, "bfloat16")
        limit = bound(Cost(flops_16=1e12), 1, 1, 1, 8, DEVICES["rtx5090"], MeshShape(devices))
        return Need(resolved, devices, estimate, memory, limit, Pool(1000, 1.0, 0))


def advice_for(peak: Callable[[TrainConfig], int], **flags: Any) -> tuple[list[str] | None, list[str]]:
    """The flags that were found, and all that were tried."""
    tried: list[str] = []
    config = dataclasses.replace(TINY, **flags)
    found = advise(Invented(peak), config, 1, lambda flags, need: tried.append(" ".join(words(flags))))
    return (None if found is None else words(found.flags)), tried


def test_the_cheapest_change_that_fits_is_taken() -> None:
    full_remat = lambda c: 900 if c.gradient_checkpointing == "full" else 1100  # noqa: E731
    assert advice_for(full_remat) == (["--gradient_checkpointing=full"], ["--gradient_checkpointing=full"])
    # Micro-batches: the largest divisor that fits, and the step stays the step.
    found, _ = advice_for(lambda c: 500 + 200 * (c.batch_size or 0))
    assert found == ["--batch_size=2", "--gradient_accumulation=4"]
    found, _ = advice_for(lambda c: 500 + 200 * (c.batch_size or 0), gradient_accumulation=3)
    assert found == ["--batch_size=2", "--gradient_accumulation=12"]
    assert advice_for(lambda c: 900 if c.train == "lora" else 1100)[0] == ["--train=lora"]
    assert advice_for(lambda c: 900 if c.quantize == "nf4" else 1100, train="lora")[0] == ["--quantize=nf4"]


def test_changes_are_added_up_where_none_is_enough() -> None:
    def peak(config: TrainConfig) -> int:
        return 1900 - 500 * (config.train == "lora") - 500 * (config.quantize == "nf4")

    found, tried = advice_for(peak)
    assert found is not None and {"--train=lora", "--quantize=nf4"} <= set(found)
    assert "--train=lora" in tried and tried[-1] == " ".join(found)
    assert len(tried) == len(set(tried))
    nothing, tried = advice_for(lambda c: 5000)
    assert nothing is None and len(tried) >= 4


def test_a_sum_has_nothing_needless_in_it() -> None:
    def peak(config: TrainConfig) -> int:
        saved = 600 * (config.train == "lora") + 400 * (config.quantize == "nf4")
        return 1900 + 10 * (config.batch_size or 0) - saved - 20 * (config.gradient_checkpointing == "full")

    # 1,980: with both it is 980 of 1,000. Neither the remat nor the micro-batches tried before are needed.
    found, tried = advice_for(peak, gradient_checkpointing="none")
    assert found == ["--train=lora", "--quantize=nf4"] and tried[-1] == " ".join(found)

    # Where micro-batches are, they are as large as the other changes let them be.
    found, _ = advice_for(lambda c: 1300 + 100 * (c.batch_size or 0) - 700 * (c.train == "lora"))
    assert found is not None and set(found) == {"--train=lora", "--batch_size=4", "--gradient_accumulation=2"}


def planned(peak: Callable[[TrainConfig], int], config: TrainConfig = TINY) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    found = plan.Planning(config, DEVICES["rtx5090"], Invented(peak), lines.append).run()
    return found, lines


def test_a_plan_that_fits() -> None:
    found, lines = planned(lambda c: 100 + 10 * (c.batch_size or 0))
    assert found["fits"] and found["peak"] == 180 and found["by"] == "compiler" and "advice" not in found
    assert [row["num_devices"] for row in found["devices"]] == [1, 2, 4, 8]
    assert found["largest_batch"] == {"value": 90, "peak": 1000, "too_large": 91}
    text = "\n".join(lines)
    assert "FITS: " in text and "--batch_size 90" in text and "not faster than" in text and "a bound" in text
    # The verdict comes before what takes longer.
    assert text.index("FITS: ") < text.index("by the number of devices") < text.index("largest batch")


def test_a_plan_that_does_not_fit_has_advice() -> None:
    found, lines = planned(lambda c: 900 if c.gradient_checkpointing == "full" else 1100)
    assert not found["fits"] and found["advice"]["flags"] == ["--gradient_checkpointing=full"]
    text = "\n".join(lines)
    assert "DOES NOT FIT: " in text and "fits with --gradient_checkpointing=full" in text


def test_quick_stops_after_the_verdict() -> None:
    candidates = Invented(lambda c: 100)
    config = dataclasses.replace(TINY, quick=True)
    found = plan.Planning(config, DEVICES["h100"], candidates, lambda line: None).run()
    assert len(candidates.asked) == 1 and not {"devices", "largest_batch", "advice"} & found.keys()


def test_more_devices_split_the_rows() -> None:
    config = dataclasses.replace(TINY, num_devices=3, batch_size=6)
    real = Candidates(systems.get("efficientids"), SCALE, gpu_target(compiles=False))
    with pytest.raises(UserError, match="--batch_size 7: does not divide among the 3 devices"):
        real.need(dataclasses.replace(config, batch_size=7), 3)
    found, _ = planned(lambda c: 100 + 10 * (c.batch_size or 0), config)
    assert found["largest_batch"]["value"] == 90 and [row["batch_size"] for row in found["devices"]] == [6, 6, 8, 8]


def test_the_mesh_is_the_one_with_the_least_to_pass_on() -> None:
    """Adapters of a 7b Llama in bfloat16 fit on a card, all of it in float32 on four does not: data, then fsdp."""
    real = Candidates(systems.get("efficientids"), SCALE, gpu_target(compiles=False))
    asked = TrainConfig(llama_size="7b", seq_len=16, batch_size=8)
    assert real.need(asked, 4, False).config.mesh == "data=4"
    assert real.need(dataclasses.replace(asked, train="full"), 8, False).config.mesh == "fsdp=8"
    with pytest.raises(UserError, match="--mesh data=2 has 2 devices, and 4 are planned for"):
        real.need(dataclasses.replace(asked, mesh="data=2"), 4, False)


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    code = cli.main(["--seq_len=16", "--plan_by=estimate", *flags])
    return code, capsys.readouterr().out


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.COMMANDS["plan"][0] == cli.__name__
    code, text = run(capsys, "--quick", "--device=h200")
    assert code == 0 and "NVIDIA H200" in text and "FITS: " in text and "nothing was compiled" in text
    code, text = run(capsys, "--json", "--recommender=sasrec")
    found = json.loads(text)
    assert code == 0 and found["by"] == "estimate" and found["fits"] and len(found["devices"]) == 4
    assert (
        found["estimate"]["total"] < found["peak"] < 1.25 * found["estimate"]["total"]
        and found["pool"]["fraction"] == 0.92
    )
    assert found["bound"]["seconds"] > 0 and found["device"]["name"] == "NVIDIA GeForce RTX 5090"
    code, text = run(capsys, "--llama_size=8b", "--train=full", "--quick")
    assert code == plan.NOTHING_FITS and "DOES NOT FIT" in text
    with pytest.raises(UserError, match="--device titan: choose one of"):
        run(capsys, "--device=titan")
    with pytest.raises(UserError, match="--plan_by run takes its steps on one GPU"):
        cli.main(["--plan_by=run", "--num_devices=4"])
    with pytest.raises(UserError, match="--force starts a run"):
        run(capsys, "--force")
    with pytest.raises(UserError, match="trains nothing"):
        run(capsys, "--recommender=popularity", "--seq_len=64")


def test_without_the_plugin_the_compiler_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "versions", lambda: {"jax": "0"})
    assert not gpu.plugin_installed()

    def missing(**_: Any) -> Any:
        raise NotImplementedError("no such platform")

    monkeypatch.setattr(gpu.topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match="jax-cuda12-plugin=="):
        plan.plan(dataclasses.replace(TINY, plan_by="compiler"), systems.get("efficientids"), SCALE)


def test_a_start_that_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = Invented(lambda c: 900 if c.gradient_checkpointing == "full" else 1100)
    with pytest.raises(UserError, match=r"it fits with --gradient_checkpointing=full .* --force starts all the same"):
        start._checked(TINY, candidates, 1)
    assert start._checked(dataclasses.replace(TINY, force=True), candidates, 1) == 1100
    assert start._checked(dataclasses.replace(TINY, gradient_checkpointing="full"), candidates, 1) == 900
    with pytest.raises(UserError, match="nothing that was tried fits"):
        start._checked(TINY, Invented(lambda c: 10**6), 1)


def test_nothing_is_checked_on_a_cpu() -> None:
    assert start.predicted_peak(TINY, systems.get("efficientids"), SCALE) is None


def test_the_whole_plan_with_the_compiler() -> None:
    need_plugin()
    system, config = systems.get("efficientids"), dataclasses.replace(TINY, num_devices=2, quick=True)
    candidates = Candidates(system, SCALE, gpu_target(pool=GIB))
    lines: list[str] = []
    found = plan.Planning(config, DEVICES["rtx5090"], candidates, lines.append).run()
    assert found["by"] == "compiler" and found["fits"] and found["num_devices"] == 2
    memory = found["compiled"]
    assert memory["peak"] == memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"]
    # The state is written in place on both.
    assert memory["aliased"] > 0.9 * memory["outputs"]
