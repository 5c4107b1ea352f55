"""Every plugin of this repository, built-in ones included, passes the contract that others are given."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tuner.builtin.hub import HubConfig
from tuner.builtin.pending.keys import PendingKeys
from tuner.builtin.sampling.keys import SamplingConfig
from tuner.selection import discover
from tuner.testing.contract import PluginContract
from tuner_wan.contract import WanContract, WanFamilyContract


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TestAdapterFormats(PluginContract):
    plugin = "adapter_formats"


class TestCheckpointing(PluginContract):
    plugin = "checkpointing"


class TestChunkedFeedForward(PluginContract):
    plugin = "chunked_ff"
    legacy_keys = frozenset({"enable_chunked_feed_forward", "feed_forward_chunk_size"})


class TestContextParallel(PluginContract):
    plugin = "context_parallel"


class TestDataReport(PluginContract):
    plugin = "data_report"


class TestEma(PluginContract):
    plugin = "ema"
    legacy_keys = frozenset({"use_ema"})


class TestEncoding(PluginContract):
    plugin = "encoding"


class TestEpochs(PluginContract):
    plugin = "epochs"


class TestDatasets(PluginContract):
    plugin = "datasets"


class TestEvaluation(PluginContract):
    plugin = "evaluation"
    legacy_keys = frozenset({"eval_epoch_interval", "eval_max_samples", "eval_steps_interval", "eval_timesteps"})


class TestExactAttention(PluginContract):
    plugin = "exact_attention"


class TestFlash(PluginContract):
    plugin = "flash"


class TestSageAttention(PluginContract):
    plugin = "sageattention"


class TestXformers(PluginContract):
    plugin = "xformers"


class TestFlex(PluginContract):
    plugin = "flex"


class TestFull(PluginContract):
    plugin = "full"


class TestGradientRelease(PluginContract):
    plugin = "gradient_release"
    legacy_keys = frozenset({"gradient_release"})


class TestCompile(PluginContract):
    plugin = "compile"
    legacy_keys = frozenset({"dynamo_backend", "dynamo_mode", "dynamo_dynamic"})


class TestKernels(PluginContract):
    plugin = "kernels"
    legacy_keys = frozenset({"fused_blocks"})


class TestLora(PluginContract):
    plugin = "lora"
    legacy_keys = frozenset({"use_dora", "use_rslora", "init_lora"})


class TestLycoris(PluginContract):
    plugin = "lycoris"


class TestMetrics(PluginContract):
    plugin = "metrics"


class TestNoiseLevels(PluginContract):
    plugin = "noise_levels"


class TestOffload(PluginContract):
    plugin = "offload"
    legacy_keys = frozenset(
        {
            "enable_group_offload",
            "enable_model_cpu_offload",
            "group_offload_blocks_per_group",
            "group_offload_resident_blocks",
            "group_offload_to_disk_path",
            "group_offload_type",
            "group_offload_use_stream",
            "text_encoder_offload",
        }
    )


class TestHub(PluginContract):
    plugin = "hub"
    legacy_keys = frozenset(HubConfig.model_fields) - {"hub_private"}


class TestOptimizers(PluginContract):
    plugin = "optimizers"
    legacy_keys = frozenset({"lr_num_cycles", "lr_power"})


class TestPending(PluginContract):
    plugin = "pending"
    legacy_keys = frozenset(PendingKeys.model_fields)


class TestPlanner(PluginContract):
    plugin = "planner"
    legacy_keys = frozenset({"memory_preset", "plan_card", "plan_ceilings"})


class TestPreview(PluginContract):
    plugin = "preview"
    legacy_keys = frozenset({"validation_preview", "validation_preview_model", "validation_preview_steps"})


class TestPriorPreservation(PluginContract):
    plugin = "prior_preservation"


class TestBitsandbytes(PluginContract):
    plugin = "bitsandbytes"


class TestFp8Scaled(PluginContract):
    plugin = "fp8_scaled"


class TestTorchao(PluginContract):
    plugin = "torchao"


class TestProducts(PluginContract):
    plugin = "products"


class TestQuanto(PluginContract):
    plugin = "quanto"


class TestReport(PluginContract):
    plugin = "report"


class TestSavePoints(PluginContract):
    plugin = "save_points"
    legacy_keys = frozenset({"checkpoint_epoch_interval", "checkpoint_minutes_interval"})


class TestSharding(PluginContract):
    plugin = "sharding"
    legacy_keys = frozenset(
        {
            "fsdp_enable",
            "fsdp_version",
            "fsdp_reshard_after_forward",
            "fsdp_cpu_offload",
            "fsdp_state_dict_type",
            "deepspeed_config",
        }
    )


class TestWatchdog(PluginContract):
    plugin = "watchdog"


class TestSampling(PluginContract):
    plugin = "sampling"
    legacy_keys = frozenset(SamplingConfig.model_fields)


class TestSources(PluginContract):
    plugin = "sources"


class TestStatus(PluginContract):
    plugin = "status"


class TestTrackers(PluginContract):
    plugin = "trackers"
    legacy_keys = frozenset({"report_to", "tracker_project_name", "tracker_run_name"})


class TestTread(PluginContract):
    plugin = "tread"


class TestScheduledSampling(PluginContract):
    plugin = "scheduled_sampling"


class TestWebhook(PluginContract):
    plugin = "webhook"
    legacy_keys = frozenset({"webhook_config"})


class TestWan(WanContract):
    pass


class TestWanFamily(WanFamilyContract):
    pass


def test_no_plugin_is_missing_here() -> None:
    classes = [each for name, each in globals().items() if name.startswith("Test") and issubclass(each, PluginContract)]
    tested = {cls.plugin for cls in classes}
    assert tested == {name for name, found in discover().items() if found.package == "difftuner"}
