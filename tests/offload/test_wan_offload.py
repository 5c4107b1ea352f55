"""Group offload of a Wan denoiser with the core's own LoRA: training is bit-equal to a resident base."""

from __future__ import annotations

import pytest
import torch

from tuner.blocks import StepContext
from tuner.builtin.lora import LoraPlugin
from tuner.config.keys import CoreConfig
from tuner.run import Run
from tuner.transforms import prepare
from tuner_offload import OffloadConfig, OffloadPlugin
from tuner_wan import WanPlugin
from tuner_wan.tiny import build_tiny_t2v


@pytest.fixture
def train(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    base = build_tiny_t2v(tmp_path / "tiny", layers=5)

    def trained(offload: bool, dtype: torch.dtype):
        """Losses and LoRA gradients of three steps, and a render."""
        run = Run(CoreConfig(pretrained_model_name_or_path=str(base)), plugins={})
        wan = WanPlugin("wan", WanPlugin.Config())
        lora = LoraPlugin("lora", LoraPlugin.Config(lora_rank=4))
        placing = OffloadPlugin("offload", OffloadConfig(enable_group_offload=offload))
        run.spec = wan.describe_model(run)
        placing.check_model(run, run.spec)
        run.place(torch.device("cpu"), dtype)
        model = wan.load_model(run)
        network = model.network
        found = [*lora.model_transforms(run=run, model=model), *placing.model_transforms(run, model)]
        prepare(run, network, sorted(found, key=lambda each: each.stage))
        network.trampoline.context = StepContext(checkpointing=True, residency=network.residency)
        parameters = [each for group in network.adapter.groups for each in group.parameters.values()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        draw = torch.Generator().manual_seed(0)
        latents, text = torch.randn(1, 16, 3, 8, 8, generator=draw), torch.randn(1, 9, 16, generator=draw)

        def forward():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                return network.module(latents, torch.tensor([400]), text, return_dict=False)[0].float()

        seen = []
        for _ in range(3):
            network.module.train()
            loss = forward().square().mean()
            loss.backward()
            seen += [loss.detach(), *(each.grad.clone() for each in parameters)]
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            seen.append(forward())
        return network, seen

    return trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wan_trains_the_same(train, dtype):
    streamed, found = train(True, dtype)
    _, expected = train(False, dtype)
    assert streamed.residency is not None
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert any(each.abs().sum() > 0 for each in found)
