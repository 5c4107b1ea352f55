"""Uploads to a hub on this machine: what it has afterwards, what fails in the middle, and what is said of it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from tuner.assembly import assemble
from tuner.builtin.hub import uploads
from tuner.errors import CheckpointError, ConfigError
from tuner.testing.hub import Hub
from tuner.train.checkpoint import read_manifest

TOKEN = "good-token"
BOTH = {"push_to_hub": True, "push_checkpoints_to_hub": True, "checkpoint_step_interval": 3}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with no repositories; whoever this process starts is logged in to it."""
    server = Hub({})
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # its server is not spoken here: large files go as ever
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(uploads, "PAUSES", (0.05, 0.05))
    yield server
    server.stop()


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.getMessage().startswith("hub:"))


def test_result_and_checkpoints(
    job: Any, hub: Hub, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, "tuner"):
        output = job.run(
            "hubbed",
            **BOTH,
            hub_model_id="my-model",
            validation_prompt="a red square, moving",
            validation_step_interval=3,
            validation_num_inference_steps=2,
        )
    files = hub.repositories["me/my-model"]
    assert hub.private == {"me/my-model"}
    # the result, in the root, as it is on the disk
    result = files["pytorch_lora_weights.safetensors"]
    assert result == (output / "checkpoint-6" / "pytorch_lora_weights.safetensors").read_bytes()
    # a checkpoint, whole: it can be read and verified as the local one is
    for name, content in files.items():
        (tmp_path / "away" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "away" / name).write_bytes(content)
    assert read_manifest(tmp_path / "away" / "checkpoint-6")["step"] == 6
    assert not any(name.startswith(("optimizer", "adapter.", "manifest")) for name in files)
    # the card
    card = files["README.md"].decode()
    assert "a red square, moving" in card
    assert 'load_lora_weights("me/my-model", weight_name="pytorch_lora_weights.safetensors")' in card
    assert "| `learning_rate` | 0.01 |" in card
    [clip] = [name for name in files if name.startswith("samples/")]
    assert clip in card
    latest = sorted((output / "validation" / "step-6").glob("*.mp4"))
    assert files[clip] == latest[0].read_bytes()
    # nothing of this machine, nothing secret
    assert str(job.folder) not in card
    assert not any(TOKEN.encode() in content for content in files.values())
    assert not list(output.glob(".tuner-partial-*"))
    told = said(caplog)
    assert "checkpoints and the result will be uploaded to my-model (private where it is new)" in told
    assert told.splitlines()[-1].startswith(f"hub: {hub.address}/me/my-model has ")
    assert told.splitlines()[-1].endswith("the result")
    assert "not uploaded" not in told


def test_card_loads_as_a_model_card(job: Any, hub: Hub, tmp_path: Path) -> None:
    job.run("carded", push_to_hub=True, hub_private=False)
    from huggingface_hub import ModelCard

    path = tmp_path / "README.md"
    path.write_bytes(hub.repositories["me/carded"]["README.md"])
    card = ModelCard.load(path)
    assert card.data.pipeline_tag == "text-to-video"
    assert "lora" in card.data.tags
    assert not hub.private
    assert not [name for name in hub.repositories["me/carded"] if name.startswith("checkpoint-")]


FAULTS = [
    ("api/repos/create", 503),
    ("/preupload/", 500),
    ("objects/batch", "close"),
    ("/large/", 500),
    ("/large/", "close"),
    ("/commit/", 500),
    ("/commit/", "close"),
    ("/commit/", "nonsense"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0].strip('/').rpartition('/')[2]}-{fault[1]}")
def test_failure_in_the_middle_is_tried_again(job: Any, hub: Hub, fault: tuple[str, Any], tmp_path: Path) -> None:
    """Driven by the queue alone, which is what a run hands its uploads to."""
    from tuner.builtin.hub.jobs import Job as Order

    content = os.urandom(200_000)
    (tmp_path / "weights.safetensors").write_bytes(content)
    (tmp_path / "notes.txt").write_text("hello")
    hub.faults.append(fault)
    queue = uploads.Uploads(tmp_path, "me/tried", True, logging.getLogger("tuner"))
    files = tuple((name, tmp_path / name) for name in ("weights.safetensors", "notes.txt"))
    queue.offer(Order("it", "a message", files))
    queue.finish()
    assert queue.report()["uploaded"] == ["it"]
    assert hub.repositories["me/tried"] == {"weights.safetensors": content, "notes.txt": b"hello"}
    assert not hub.faults


def test_hub_that_refuses(job: Any, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.writers.clear()
    output = job.run("refused", **BOTH)
    told = said(caplog)
    assert "nobody is logged in, or the login is no longer good: `hf auth login`" in told
    assert "the result was not uploaded" in told
    assert "start the same run again" in told
    assert TOKEN not in told
    assert (output / "checkpoint-6").is_dir()
    # … and later, logged in, the same run has nothing to train, and uploads
    hub.writers.add(TOKEN)
    job.run("refused", push_to_hub=True, resume_from_checkpoint="latest")
    assert "pytorch_lora_weights.safetensors" in hub.repositories["me/refused"]


def test_hub_that_stalls_ends_with_the_truth(
    job: Any, hub: Hub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PATIENCE", 4.0)
    monkeypatch.setattr(uploads, "PAUSES", ())
    hub.faults.append(("/commit/", "stall"))
    output = job.run("stalled", push_to_hub=True)
    assert "the result was not uploaded: the hub gave no sign of life" in said(caplog)
    assert (output / "checkpoint-6" / "pytorch_lora_weights.safetensors").is_file()


def test_unreachable_hub_changes_no_bit_of_the_run(
    job: Any, hub: Hub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(uploads, "PAUSES", ())
    plain, uploading = job.run("plain-hub"), job.run("dead-hub", **BOTH)
    name = "checkpoint-6/pytorch_lora_weights.safetensors"
    first, second = load_file(plain / name), load_file(uploading / name)
    assert all(first[key].equal(second[key]) for key in first)
    assert "the result was not uploaded" in said(caplog)


def test_pruned_checkpoint_is_still_uploaded(job: Any, hub: Hub) -> None:
    output = job.run("pruned", **{**BOTH, "checkpoint_step_interval": 5}, checkpoints_total_limit=1)
    kept = [path.name for path in output.glob("checkpoint-*")]
    assert kept == ["checkpoint-6"]
    names = {name.partition("/")[0] for name in hub.repositories["me/pruned"] if name.startswith("checkpoint-")}
    assert names  # the newest at least; one that waited made room for it, or was sent
    assert "checkpoint-6" in names


def test_files_are_held_while_they_wait(tmp_path: Path) -> None:
    """Removing a checkpoint takes nothing from an upload that has not begun."""
    from tuner.builtin.hub.jobs import _linked

    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "ema").mkdir(parents=True)
    (checkpoint / "ema" / "a.safetensors").write_bytes(b"weights")
    (checkpoint / ".tuner-partial-1").write_bytes(b"half")
    held = _linked(checkpoint, tmp_path / "held")
    shutil.rmtree(checkpoint)
    assert [(name, path.read_bytes()) for name, path in held] == [("ema/a.safetensors", b"weights")]


def test_persons_own_card_is_kept(job: Any, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.repositories["me/mine"] = {"README.md": b"# my own words\n"}
    with caplog.at_level(logging.INFO, "tuner"):
        job.run("own-card", push_to_hub=True, hub_model_id="me/mine")
    files = hub.repositories["me/mine"]
    assert files["README.md"] == b"# my own words\n"
    assert "pytorch_lora_weights.safetensors" in files
    assert "README.md of" in said(caplog)
    assert "is kept" in said(caplog)


def test_name_that_cannot_be(job: Any) -> None:
    with pytest.raises(ConfigError, match="no repository of the hub can be called 'a b/c'"):
        job.run("named", push_to_hub=True, hub_model_id="a b/c")


def test_nobody_logged_in(
    job: Any, hub: Hub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    job.run("nobody", push_to_hub=True)
    assert "`hf auth login` (there is no token on this machine)" in said(caplog)
    assert not hub.repositories


def test_warnings(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(**keys: Any) -> str:
        with job.on_path():
            assembly = assemble(job.config("warned", **keys))
        return "\n".join(assembly.plugins["hub"].warnings(assembly.core))

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert lines(push_to_hub=True) == ""
    assert "hub_model_id does nothing" in lines(hub_model_id="x")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in lines(push_to_hub=True)


def test_upload_ends_with_the_run(hub: Hub, tmp_path: Path) -> None:
    """A run that is killed leaves no upload behind: its standard input is closed."""
    hub.faults.append(("api/repos/create", "stall"))
    command = [sys.executable, "-m", "tuner.builtin.hub.upload"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        order = {"repository": "me/left", "private": True, "message": "m", "files": []}
        child.stdin.write(json.dumps(order) + "\n")
        child.stdin.close()
        assert child.wait(60) == 1


ENDED = "-- ended --\n"
RUNS = f"""
import sys
from tuner.cli import main
config, *references = sys.argv[1:]
for reference in references:
    sys.argv[1:] = ["run", "--config", config, "--resume_from_checkpoint", reference]
    try:
        main()
    except SystemExit as ended:
        print("exit code", ended.code, file=sys.stderr)
    print({ENDED!r}, end="", file=sys.stderr)
"""


class TestResume:
    """Going on from the hub. Its package reads the address once, so the runs are in a process of their own."""

    def start(
        self, job: Any, output: str, references: tuple[str, ...], tmp_path: Path, **keys: Any
    ) -> subprocess.CompletedProcess[str]:
        """``tuner run`` once for each of ``references``, one after the other."""
        config = tmp_path / "config.json"
        config.write_text(json.dumps(job.config(output, **keys)))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(job.distribution), *sys.path])}
        command = [sys.executable, "-c", RUNS, str(config), *references]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)

    @pytest.fixture(scope="class")
    def uploaded(self, job: Any) -> dict[str, bytes]:
        """A repository with the checkpoints of half a run."""
        output = job.run("hub-half", max_train_steps=3)
        folder = output / "checkpoint-3"
        files = {f"checkpoint-3/{each.relative_to(folder)}": each.read_bytes() for each in folder.rglob("*")}
        return files | {"README.md": b"a card", "checkpoint-2/half.safetensors": b"no manifest: never finished"}

    def test_a_run_goes_on_from_the_hub(
        self, job: Any, hub: Hub, uploaded: dict[str, bytes], state_of: Any, tmp_path: Path
    ) -> None:
        hub.repositories["me/half"] = uploaded
        whole = job.run("hub-undisturbed")
        # The second time what was done here is not thrown away.
        done = self.start(job, "hub-resumed", ("hub:me/half", "hub:me/half/checkpoint-3"), tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("exit code 0\n") == 2
        assert "nothing to train" in done.stdout
        assert state_of(job.folder / "hub-resumed", 6) == state_of(whole, 6)

    def test_what_is_damaged_or_not_there_is_one_error(
        self, job: Any, hub: Hub, uploaded: dict[str, bytes], tmp_path: Path
    ) -> None:
        [name] = [each for each in uploaded if each.endswith("pytorch_lora_weights.safetensors")]
        hub.repositories |= {"me/half": uploaded, "me/bad": uploaded | {name: b"cut"}, "me/gated": uploaded}
        hub.gated = ("me/gated",)
        wrong = {
            "hub:me/half/checkpoint-9": "has no checkpoint-9 on the hub",
            "hub:me/none": "there is no repository me/none",
            "hub:me/bad": "is missing or damaged",
            "hub:me/gated": "me/gated is gated, and this machine's login may not read it",
        }
        done = self.start(job, "hub-refused", tuple(wrong), tmp_path)
        for told, words in zip(done.stderr.split(ENDED)[:-1], wrong.values(), strict=True):
            assert words in told
            assert "exit code 2" in told
            assert "Traceback" not in told
        assert not list((job.folder / "hub-refused").glob("checkpoint-*"))

    def test_offline_is_said_with_the_variable(self, tmp_path: Path) -> None:
        from tuner.builtin.hub.fetch import fetch

        run: Any = SimpleNamespace(output_dir=tmp_path, log=logging.getLogger("tuner"))
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):  # all tests are offline
            fetch(run, "hub:me/half")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("text", ["hub:me", "hub:a/b/c", "hub:a/b/checkpoint-x", "hub:"])
    def test_what_is_no_reference(self, text: str) -> None:
        from tuner.builtin.hub.fetch import Reference

        with pytest.raises(ConfigError, match="names no checkpoint on the hub"):
            Reference.parse(text)
