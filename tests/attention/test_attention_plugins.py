"""Each library's plugin: which names it serves, what it says where it cannot run, how it calls the library."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

import tuner_attention
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.run import Run
from tuner.selection import Catalog
from tuner_attention import FlashPlugin, SagePlugin
from tuner_attention.sage import sage

NOT_FOR_THIS = {"_native_npu", "_native_xla"}
"""Kernels of devices that torch.cuda does not drive."""


def run(name: str, **keys: object) -> Run:
    return Run(CoreConfig(attention_mechanism=name, **keys), plugins={})


def test_every_kernel_of_the_dispatcher_has_a_plugin() -> None:
    catalog = Catalog()
    without = {each.value for each in AttentionBackendName if not catalog.providers("attention_mechanism", each.value)}
    assert without == NOT_FOR_THIS


@pytest.mark.parametrize(("plugin", "name"), [(SagePlugin, "sageattention"), (FlashPlugin, "flash")])
def test_without_a_cuda_device_the_exact_kernel_is_used_and_said(plugin, name, monkeypatch, caplog) -> None:
    monkeypatch.setattr(tuner_attention, "_cuda", lambda: False)
    loaded = plugin(plugin.__name__, plugin.Config())
    with caplog.at_level(logging.WARNING):
        loaded.configure(run=run(name))
    assert f"{name!r} needs a CUDA device: the exact kernel is used here" in caplog.text
    assert loaded.attention_backends(run=run(name))[name] is None


def test_with_a_device_a_missing_library_is_one_error_that_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr(tuner_attention, "_cuda", lambda: True)
    with pytest.raises(ConfigError, match="package flash_attn, which is not installed") as caught:
        FlashPlugin("flash", FlashPlugin.Config()).configure(run=run("flash"))
    assert "pip install flash-attn" in str(caught.value)
    assert "auto" in str(caught.value)


def test_nothing_is_said_by_a_plugin_whose_kernel_was_not_chosen(monkeypatch, caplog) -> None:
    monkeypatch.setattr(tuner_attention, "_cuda", lambda: False)
    SagePlugin("sageattention", SagePlugin.Config()).configure(run=run("auto"))
    assert not caplog.text


@pytest.fixture
def library(monkeypatch):
    """A stand-in for the package, of a version; it notes how it was called."""

    def install(version: str, *functions: str) -> SimpleNamespace:
        seen = SimpleNamespace(calls=[])

        def function(name: str):
            def call(query, key, value, *, tensor_layout: str, is_causal: bool):
                seen.calls.append((name, query.dtype, tensor_layout, is_causal))
                key -= 1  # as version 1 does
                return query

            return call

        module = ModuleType("sageattention")
        for name in functions:
            setattr(module, name, function(name))
        monkeypatch.setitem(sys.modules, "sageattention", module)
        monkeypatch.setattr("tuner_attention.sage.version", lambda _: version)
        return seen

    return install


def test_version_one_is_called_on_copies_of_the_keys_in_16_bits(library) -> None:
    seen = library("1.0.6", "sageattn")
    key = torch.ones(1, 4, 2, 64)
    out = sage("sageattention")(torch.ones(1, 4, 2, 64), key, torch.ones(1, 4, 2, 64, dtype=torch.bfloat16))
    assert seen.calls == [("sageattn", torch.bfloat16, "NHD", False)]
    assert torch.equal(key, torch.ones(1, 4, 2, 64))
    assert out.dtype == torch.bfloat16
    half = key.bfloat16()
    sage("sageattention")(half, half, half)
    assert torch.equal(half, torch.ones(1, 4, 2, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("sage", "sageattn"),
        ("sageattention-int8-fp16-cuda", "sageattn_qk_int8_pv_fp16_cuda"),
        ("sageattention-int8-fp8-cuda", "sageattn_qk_int8_pv_fp8_cuda"),
        ("_sage_qk_int8_pv_fp16_triton", "sageattn_qk_int8_pv_fp16_triton"),
    ],
)
def test_each_name_means_its_function_of_version_two(name: str, function: str, library) -> None:
    seen = library("2.2.0", "sageattn", function)
    rows = [torch.ones(1, 4, 2, 64, dtype=torch.float16) for _ in range(3)]
    sage(name)(*rows)
    assert [each[0] for each in seen.calls] == [function]


def test_a_function_that_the_installed_version_lacks_is_an_error(library) -> None:
    library("1.0.6", "sageattn")
    with pytest.raises(ConfigError, match=r"needs SageAttention 2.1.1 or newer, and 1.0.6 is installed"):
        sage("sageattention-int8-fp8-cuda")
