"""Every kind of LoRA is resumed bit for bit, also those whose start comes out of the base's own weights."""

from __future__ import annotations

from typing import Any

import pytest

KINDS: dict[str, dict[str, Any]] = {
    "pissa": {"lora_init_type": "pissa"},
    "olora": {"lora_init_type": "olora"},
    "orthogonal": {"lora_init_type": "orthogonal"},
    "dora": {"use_dora": True, "lora_format": "diffusers"},
    "rslora": {"use_rslora": True, "lora_alpha": 2},
    "bf16": {"lora_dtype": "bf16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bit_equal_to_an_undisturbed_one(job, state_of, steps_of, kind: str) -> None:
    keys = KINDS[kind] | {"lr_scheduler": "constant", "use_ema": True}
    whole = job.run(f"{kind}-whole", **keys)
    job.run(f"{kind}-halves", **keys, max_train_steps=3)
    halves = job.run(f"{kind}-halves", **keys, resume_from_checkpoint="latest")
    assert state_of(halves, 6) == state_of(whole, 6)
    assert steps_of(halves) == steps_of(whole)
