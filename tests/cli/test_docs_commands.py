"""Every command of the docs is run: here, in a folder that has what the pages speak of, or by a test that is named."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tuner import pipeline
from tuner.assembly import assemble
from tuner.cli import app
from tuner.testing.clips import render_clip
from tuner.testing.project import flat_config, video_entry
from tuner_wan.tiny import build_tiny_t2v

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
ELSEWHERE = {
    r"--install-completion": "cli/test_completion.py",  # writes into a person's shell
    r"(check|run) --config examples/(?!quickstart)": "cli/test_examples.py",
    r"run .*--config examples/quickstart": "wan/test_quickstart.py",
    r".*drift": "run/test_tutorial.py",  # a package that is written first
    r"plugins show ltx": "ltx/test_ltx_package.py",
    r"configure$": "cli/test_configure_terminal.py",  # asks questions
    r"doctor": "cli/test_doctor.py",
    r"import ": "cli/test_import_musubi.py",
    r"launch": "run/test_several_processes.py",  # processes of its own
    r"report .*--serve": "report/test_report_server.py",  # until it is interrupted
    r"convert|merge a.safetensors b": "files/test_adapter_commands.py",  # files of real models
}


def documented() -> list[str]:
    """The commands, without ``tuner``, each once."""
    found: dict[str, None] = {}
    for page in PAGES:
        for block in re.findall(r"^```.*?^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines()[1:-1]:
                words = re.sub(r"^(\$ |\.venv/bin/)", "", line.strip())
                if words.startswith("tuner "):
                    found[re.split(r"\s{2,}|\s#\s|\s[&|>]", words)[0].removeprefix("tuner ")] = None
    return list(found)


def elsewhere(command: str) -> str | None:
    return next((test for pattern, test in ELSEWHERE.items() if re.match(pattern, command)), None)


HERE = [command for command in documented() if elsewhere(command) is None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, clips, a config, a run and LoRA files, under the names that the pages use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("place")
    build_tiny_t2v(folder / "Wan2.1-T2V-1.3B-Diffusers")
    build_tiny_t2v(folder / "my-fine-tune", seed=1)
    for index in range(2):
        path = folder / "datasets" / "rex" / f"clip {index}.mp4"
        path.with_suffix(".txt").write_text(render_clip(path, width=64, height=64, frames=9, fps=16, seed=index))
    usual = {
        "pretrained_model_name_or_path": str(folder / "Wan2.1-T2V-1.3B-Diffusers"),
        "output_dir": str(folder / "output" / "my-run"),
        "max_train_steps": 1,
        "lora_rank": 2,
        "resume_from_checkpoint": "latest",
        "validation_prompt": "a red fox",
        "validation_num_inference_steps": 1,
        "validation_resolution": "32x32",
        "validation_num_video_frames": 5,
        "tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -1}]},
    }
    config = flat_config(
        folder, video_entry(folder / "datasets" / "rex", resolution=32, frames=5), family="wan", **usual
    )
    pipeline.run(assemble(config))
    for path in (folder / "config.json", folder / "config" / "config.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(config))
    [lora] = (folder / "output").rglob("pytorch_lora_weights.safetensors")
    for name in ("lora", "my", "a", "b"):
        shutil.copy(lora, folder / f"{name}.safetensors")
    (folder / "output" / "checkpoint-500").mkdir()
    shutil.copy(lora, folder / "output" / "checkpoint-500")
    yield folder
    torch.set_num_threads(threads)


@pytest.mark.parametrize("command", HERE)
def test_it_runs(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words = shlex.split(command)
    if "-o" in words:  # nothing of a person's is overwritten
        Path(words[words.index("-o") + 1]).unlink(missing_ok=True)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.exception


def test_the_others_are_run_by_tests_that_there_are() -> None:
    left = [command for command in documented() if elsewhere(command)]
    assert len(HERE) > 15
    for pattern, test in ELSEWHERE.items():
        assert (ROOT / "tests" / test).is_file(), test
        assert any(re.match(pattern, command) for command in left), f"{pattern}: no page has such a command any more"
