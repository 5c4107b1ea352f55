"""The host waits for the device at most once in an optimizer step, whatever is configured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from tuner.testing.clips import render_clip
from tuner.testing.opened import opened
from tuner.testing.project import TEXT, flat_config, video_entry
from tuner.testing.waits import HostWaits
from tuner.train import loop
from tuner_wan.tiny import build_tiny

T2V, TI2V, I2V = "t2v-480p-1.3b-2.1", "ti2v-5b-2.2", "i2v-14b-2.1"
STEPS = 2
ROUTE = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 1}]}
MASKED = {"id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask"}
CASES: dict[str, dict[str, Any]] = {
    "routes, masks, average": {
        "tread_config": ROUTE,
        "tread_selector": "motion",
        "masked": True,
        "use_ema": True,
        "loss_weighting": "cosmap",
        "gradient_accumulation_steps": 2,
        "noise_levels_interval": 100,
        "gradient_checkpointing": True,
        "max_grad_norm": 1.0,
    },
    "fused, selective, values clipped": {
        "fused_blocks": True,
        "gradient_checkpointing": "selective",
        "grad_clip_method": "value",
        "flow_schedule_auto_shift": True,
        "mixed_precision": "bf16",
        "use_ema": True,
        "ema_device": "cpu",
    },
    "LyCORIS": {"lora_type": "lycoris", "lycoris_config": {"algo": "lokr", "multiplier": 1.0, "linear_dim": 4}},
    "clean first frame": {"model": TI2V, "tread_config": ROUTE, "masked": True, "use_ema": True},
    "first frame": {"model": I2V, "gradient_checkpointing": True, "optimizer": "optimi-lion"},
    "rollout": {"scheduled_sampling_max_step_offset": 2, "scheduled_sampling_probability": 1.0},
    "prior": {"regularisation": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("waits")
    (folder / "clips").mkdir()
    (folder / "masks").mkdir()
    for index in range(2):
        render_clip(folder / "clips" / f"{index}.mp4", width=64, height=64, frames=9, fps=16, seed=index)
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, 0, 20, 64))
        mask.save(folder / "masks" / f"{index}.png")
    for flavour in (T2V, TI2V, I2V):
        build_tiny(folder / flavour, flavour, layers=3)
    return folder


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(*, model: str = T2V, masked: bool = False, regularisation: bool = False, **keys: Any) -> dict[str, Any]:
        clips = video_entry(folder / "clips", repeats=1)
        if regularisation:
            clips["is_regularisation_data"] = True
        masks = {**MASKED, "instance_data_dir": str(folder / "masks")}
        data = [clips | {"conditioning_data": "masks"}, masks] if masked else [clips]
        return flat_config(
            tmp_path,
            family="wan",
            model_flavour=model,
            pretrained_model_name_or_path=str(folder / model),
            data_backend_config=[*data, dict(TEXT)],
            max_train_steps=STEPS,
            train_batch_size=2,
            logging_steps=1,
            **keys,
        )

    return make


def count(
    patch: pytest.MonkeyPatch, session: Any, *, waits: Callable[..., HostWaits] = HostWaits.of
) -> list[list[str]]:
    """The waits of each step of a run, its log line included."""
    found, iterate = [], loop._iterate

    def counted(*given: Any) -> None:
        modules = [network.module for network in session.model.networks.values()]
        with waits(*modules) as each:
            iterate(*given)
        found.append(each.waits)

    with patch.context() as patched:
        patched.setattr(loop, "_iterate", counted)
        patched.setattr(loop, "validate", lambda *_: {})
        loop.train(session)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_once_a_step(
    settings: Callable[..., dict[str, Any]], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(**CASES[case])
    with opened(given) as session:
        found = count(monkeypatch, session)
    assert len(found) == STEPS
    for waits in found:
        assert len(waits) == 1, waits
        assert "train/step.py" in waits[0]
    lines = [json.loads(line) for line in (Path(given["output_dir"]) / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["loss"] >= 0 and line["grad_norm"] >= 0 for line in lines)


def test_every_kind_of_wait_is_seen() -> None:
    """What the test above would not see it could not forbid."""
    here, device = torch.arange(4.0), torch.device("cpu")
    model = nn.Linear(4, 4)

    def sends() -> None:
        here.to(device)

    reads: list[Callable[[], object]] = [
        lambda: model(here).sum().item(),
        lambda: float(model(here).mean()),
        lambda: bool(model(here).isnan().any()),
        lambda: model(here).tolist(),
        lambda: model(here).detach().cpu(),
        lambda: model(here).detach().numpy(),
        lambda: model(here)[model(here) > 0],
        lambda: model(here).nonzero(),
        lambda: torch.empty(4).copy_(model(here).detach()),
        lambda: torch.equal(model.weight, model.weight),
        lambda: torch.tensor([1.0], device=device),
        sends,
    ]
    for read in reads:
        with HostWaits.of(model) as found:
            read()
        assert len(found.waits) == 1, read
        assert "test_host_waits" in found.waits[0]
    with HostWaits.of(model) as found:
        sent = here.to(device, non_blocking=True)
        model(sent).sum().backward()
        assert here.sum().item() == 6
        torch.zeros((), device=device).add_(1)
        assert torch.equal(here, here)
    assert not found.waits
    assert found.is_there(sent)
    assert found.is_there(model.weight.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_nothing_waits_but_the_one_read(
    settings: Callable[..., dict[str, Any]], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's own check: any other wait is an error. The first step sets up libraries, which may wait."""
    read = torch.Tensor.tolist

    def allowed(tensor: torch.Tensor) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return read(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("error" if steps else "default")

    steps: list[bool] = []
    with opened(settings(**CASES[case])) as session:
        iterate = loop.train_step

        def strict(given: Any) -> Any:
            if session.run.step:
                steps.append(True)
                torch.cuda.set_sync_debug_mode("error")
            try:
                return iterate(given)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(torch.Tensor, "tolist", allowed)
        monkeypatch.setattr(loop, "train_step", strict)
        monkeypatch.setattr(loop, "validate", lambda *_: {})
        loop.train(session)
    assert len(steps) == STEPS - 1
