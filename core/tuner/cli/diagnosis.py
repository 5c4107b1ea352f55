"""The questions of ``tuner doctor``, by group: ``python -m tuner.cli.diagnosis GROUP`` prints the answers as JSON.

An answer is (mark, name, words); the mark is ``well``, ``note`` (not there, not needed) or ``bad`` (training cannot do
without). Nothing secret is said.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Line = tuple[str, str, str]
GIB = 2**30
ANSWER_SECONDS = 5.0
"""How long the hub may take."""
NEEDED = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "av",
    "pydantic",
)
OPTIONAL = {
    "triton": ("triton", "kernels of `fused_blocks` and of dynamo_backend inductor on a GPU"),
    "flash_attn": ("flash-attn", "attention_mechanism flash"),
    "sageattention": ("sageattention", "attention_mechanism sageattention"),
    "xformers": ("xformers", "attention_mechanism xformers"),
    "optimum.quanto": ("optimum-quanto", "base_model_precision …-quanto"),
    "torchao": ("torchao", "base_model_precision …-torchao, optimizers ao-…"),
    "bitsandbytes": ("bitsandbytes", "base_model_precision …-bnb, optimizers bnb-…"),
    "lycoris": ("lycoris-lora", "lora_type lycoris"),
    "schedulefree": ("schedulefree", "optimizer adamw_schedulefree"),
    "prodigyopt": ("prodigyopt", "optimizer prodigy"),
    "tensorboard": ("tensorboard", "report_to tensorboard"),
    "wandb": ("wandb", "report_to wandb"),
    "trackio": ("trackio", "report_to trackio"),
    "mlflow": ("mlflow", "report_to mlflow"),
    "comet_ml": ("comet-ml", "report_to comet"),
    "swanlab": ("swanlab", "report_to swanlab"),
    "pyarrow": ("pyarrow", "datasets in Parquet"),
    "s3fs": ("s3fs", "datasets in S3"),
    "zstandard": ("zstandard", "compress_disk_cache"),
}
VARIABLES = re.compile(r"(CUDA|PYTORCH|TORCH|HF|HUGGINGFACE|NCCL|OMP|MKL|WANDB|TUNER|TRAINER|WAN)_|RANK$|WORLD_SIZE$")
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def programs() -> Iterator[Line]:
    """Python, and the packages that every run needs."""
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield (
        "well" if supported else "bad",
        "Python",
        platform.python_version() + ("" if supported else ": use 3.11 to 3.13"),
    )
    yield "well", "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "well", "tuner", _version("difftuner") or "not installed as a package"
    for name in NEEDED:
        found = _version(name)
        yield ("well" if found else "bad"), name, found or f"not installed: pip install {name}"


def optional() -> Iterator[Line]:
    """Packages that features need, and the command that installs each."""
    for module, (package, use) in OPTIONAL.items():
        there = find_spec(module.partition(".")[0]) is not None
        yield (
            ("well", package, _version(package) or "there")
            if there
            else ("note", package, f"pip install {package}: {use}")
        )


def device() -> Iterator[Line]:
    """What torch can train on."""
    import torch

    yield (
        "well",
        "torch",
        f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads",
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            free, _ = torch.cuda.mem_get_info(index)
            memory = f"{found.total_memory / GIB:.1f} GiB, {free / GIB:.1f} free"
            yield "well", f"cuda:{index}", f"{found.name}, capability {found.major}.{found.minor}, {memory}"
            if not torch.cuda.is_bf16_supported():
                yield "note", f"cuda:{index}", "has no bfloat16: set mixed_precision to no"
        yield "well", "driver", _driver()
    elif torch.backends.mps.is_available():
        yield "well", "mps", "Apple GPU; nothing here was tried on one"
    else:
        yield "note", "device", "no GPU that torch can use: training runs on the CPU, for tests only"


def machine() -> Iterator[Line]:
    """Memory, disk, limits, codecs."""
    import av
    import psutil

    memory = psutil.virtual_memory()
    yield "well", "memory", f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} free"
    yield "well", "processors", str(os.cpu_count())
    free = shutil.disk_usage(Path.cwd()).free
    yield ("well" if free > GIB else "bad"), "disk here", f"{free / GIB:.1f} GiB free in {_masked(str(Path.cwd()))}"
    yield from _limits()
    codecs = set(av.codecs_available)
    for name, needed in (("h264", True), ("libx264", True), ("hevc", False), ("vp9", False), ("av1", False)):
        mark = "well" if name in codecs else "bad" if needed else "note"
        yield mark, f"codec {name}", "there, in PyAV" if name in codecs else "PyAV was built without it"


def network() -> Iterator[Line]:
    """The hub, and whether someone is logged in."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield "note", "hub", "HF_HUB_OFFLINE is set: only what is in its cache is used"
    else:
        yield _reachable(constants.ENDPOINT)
    yield ("well", "hub login", "there is a token") if get_token() else ("note", "hub login", "none: `hf auth login`")
    yield "well", "hub cache", _masked(str(constants.HF_HUB_CACHE))


def plugins() -> Iterator[Line]:
    """Every installed plugin: whether it can be imported, and whether its hooks are hooks."""
    from tuner.errors import PluginError
    from tuner.manager import check_hooks
    from tuner.selection import discover

    for name, found in discover().items():
        try:
            cls: Any = found.load()
            check_hooks(name, cls)
        except PluginError as error:
            yield "bad", name, f"{found.source}: {error.what}"
        else:
            if not found.builtin:
                yield "well", name, found.source


def environment() -> Iterator[Line]:
    """Variables that change what happens, without secrets."""
    for name, value in sorted(os.environ.items()):
        if VARIABLES.search(name):
            yield "note", name, "set, not shown" if SECRET.search(name) else _masked(value)


GROUPS: dict[str, Callable[[], Iterator[Line]]] = {
    "programs": programs,
    "device": device,
    "machine": machine,
    "plugins": plugins,
    "optional": optional,
    "network": network,
    "environment": environment,
}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown: nvidia-smi gave no answer"
    return (done.stdout.splitlines() or ["unknown"])[0]


def _limits() -> Iterator[Line]:
    try:
        import resource
    except ImportError:  # Windows
        return
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = 0 <= files < 1024
    yield ("note" if low else "well"), "open files", f"{files}" + (": raise it with `ulimit -n 4096`" if low else "")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield "well", "locked memory", "unlimited" if locked < 0 else f"{locked / 2**20:.0f} MiB"


def _reachable(address: str) -> Line:
    import urllib3

    try:
        answer = urllib3.request("HEAD", address, timeout=ANSWER_SECONDS, retries=False)
    except urllib3.exceptions.HTTPError as error:
        return "note", "hub", f"cannot be reached at {address} ({type(error).__name__}): models must be in its cache"
    return "well", "hub", f"answers at {address} ({answer.status})"


def _masked(text: str) -> str:
    """Without the home folder's name, which is often a person's, and without logins in addresses."""
    home = str(Path.home())
    return re.sub(r"(\w+://)[^/\s@]+@", r"\1", text.replace(home, "~") if len(home) > 1 else text)


if __name__ == "__main__":
    print(json.dumps(list(GROUPS[sys.argv[1]]())))
