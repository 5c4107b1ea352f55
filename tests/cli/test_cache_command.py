"""``tuner cache`` as a user runs it: alone, spread over processes, checking, pruning."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tuner import cli
from tuner.builtin.encoding.store import Store
from tuner.testing.clips import render_clip
from tuner.testing.plugin_env import environment, importable, toy_distribution
from tuner.testing.toy import build_toy


class Work:
    """A folder with a toy model and three clips."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"
        self.site = toy_distribution(folder / "site")
        build_toy(folder / "model")
        (folder / "clips").mkdir()
        for index in range(3):
            render_clip(folder / f"clips/{index}.mp4", width=96, height=64, frames=9, fps=16, seed=index)
            (folder / f"clips/{index}.txt").write_text(f"clip {index}")
        self.write("config.json", 9)

    def write(self, name: str, frames: int, **keys: Any) -> str:
        """Write a config that trains at ``frames``; its path."""
        clips = {
            "id": "clips",
            "dataset_type": "video",
            "instance_data_dir": str(self.folder / "clips"),
            "cache_dir_vae": str(self.cache / "vae"),
            "resolution": 64,
            "video": {"num_frames": frames},
        }
        text = {"id": "text", "dataset_type": "text_embeds", "default": True, "cache_dir": str(self.cache / "text")}
        config = {
            "model_family": "toy",
            "pretrained_model_name_or_path": str(self.folder / "model"),
            "output_dir": str(self.folder / "output"),
            "mixed_precision": "no",
            "max_train_steps": 1,
            "data_backend_config": [clips, text],
        }
        (self.folder / name).write_text(json.dumps(config | keys))
        return str(self.folder / name)

    def entries(self) -> set[str]:
        """The names of all entries."""
        return {path.name for path in self.cache.rglob("*") if ".safetensors" in path.name}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    for variable in ("RANK", "WORLD_SIZE", "TRAINER_EXTRA_ARGS"):
        monkeypatch.delenv(variable, raising=False)
    made = Work(tmp_path)
    with importable(made.site):
        yield made


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run ``tuner cache WORDS`` in this process: exit code, output, errors."""

    def cache(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tuner", "cache", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return cache


def spread(work: Work, *words: str) -> tuple[int, str]:
    """Run ``torchrun -m tuner WORDS`` in two processes: exit code and all that was said."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tuner"]
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, *words],
        env=environment(work.site, **variables),
        cwd=work.folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_launcher_spreads_the_work_and_one_process_speaks(work: Work, call: Any) -> None:
    code, said = spread(work, "cache", "--config", "config.json")
    assert code == 0, said
    assert said.count("plugins: ") == said.count("dataset clips: 3 kept") == 1
    assert said.count("cache: 7 entries encoded") == 1
    code, _, err = call("--config", work.write("config.json", 9))
    assert (code, "cache: 0 entries encoded" in err) == (0, True)


def test_an_error_in_several_processes_is_shown_once_and_ends_them(work: Work) -> None:
    """Only the second has a full disk."""
    (work.folder / "site" / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import pathlib\n"
        "    whole = pathlib.Path.write_bytes\n"
        "    def full(path, data):\n"
        "        if '.safetensors' in path.name:\n"
        "            raise OSError(28, 'No space left on device')\n"
        "        return whole(path, data)\n"
        "    pathlib.Path.write_bytes = full\n"
    )
    code, said = spread(work, "cache", "--config", "config.json")
    assert code != 0
    assert said.count("error: the disk is full: the cache cannot be written") == 1
    assert not [path for path in work.cache.rglob("*") if path.name.startswith(".tuner-partial")]


def test_a_full_check_finds_what_a_usual_start_believes(work: Work, call: Any) -> None:
    config = work.write("config.json", 9)
    assert call("--config", config)[0] == 0
    path = next((work.cache / "vae").glob("??/*.safetensors"))
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "cache: 0 entries encoded" in call("--config", config)[2]
    assert "cache: 1 entries encoded, 1 of them because they were damaged" in call("--config", config, "--verify")[2]
    assert Store(work.cache / "vae").is_whole(path.stem)


def test_pruning_says_what_would_go_before_anything_goes(
    work: Work, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("--config", work.write("old.json", 5))
    old = work.entries()
    config = work.write("config.json", 9)
    call("--config", config)
    everything = work.entries()
    (work.cache / "vae" / "latents.pt").write_bytes(b"somebody else's")

    code, out, _ = call("--config", config, "--prune", "--dry-run")
    assert code == 0
    assert re.search(r"cache/vae: 3 entries in use, 3 files not, \d+\.\d MB", out)
    assert re.search(r"cache/text: 4 entries in use, 0 files not", out)
    listed = {Path(line.strip()).name for line in out.splitlines() if line.startswith("  /")}
    assert listed <= old
    assert len(listed) == 3
    assert work.entries() == everything

    code, _, err = call("--config", config, "--prune")
    assert (code, "no terminal to ask on" in err) == (2, True)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda question: False)
    assert call("--config", config, "--prune")[0] == 0
    assert work.entries() == everything, "asked, and told to leave them"

    code, out, _ = call("--config", config, "--prune", "--yes")
    assert (code, "removed 3 files" in out) == (0, True)
    assert work.entries() == everything - listed
    assert (work.cache / "vae" / "latents.pt").read_bytes() == b"somebody else's"
    assert "cache: 0 entries encoded" in call("--config", config)[2]
    code, out, _ = call("--config", config, "--prune", "--yes")
    assert (code, "removed" in out) == (0, False)


def test_a_config_that_uses_nothing_of_a_folder_is_warned(work: Work, call: Any) -> None:
    call("--config", work.write("old.json", 5))
    _, out, _ = call("--config", work.write("config.json", 9), "--prune", "--dry-run")
    assert "none of them is this config's" in out


@pytest.mark.parametrize("words", [("--yes",), ("--dry-run",), ("--prune", "--verify", "--yes")])
def test_flags_that_do_not_go_together_are_refused(words: tuple[str, ...], work: Work, call: Any) -> None:
    code, _, err = call("--config", str(work.folder / "config.json"), *words)
    assert code == 2
    assert "--prune" in err
    assert not work.entries()


def test_packed_entries_and_the_toy_familys_words(work: Work, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = work.write("packed.json", 9, compress_disk_cache=True, vae_enable_tiling=True)
    code, _, err = call("--config", config)
    assert code == 0
    assert "vae_enable_tiling has no effect" in err
    assert all(name.endswith(".safetensors.zst") for name in work.entries())
    assert "cache: 0 entries encoded" in call("--config", work.write("config.json", 9))[2]
    monkeypatch.setitem(sys.modules, "zstandard", None)
    code, _, err = call("--config", config)
    assert (code, "difftuner[zstd]" in err) == (2, True)
