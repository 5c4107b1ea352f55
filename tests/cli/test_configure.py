"""`tuner configure --yes`: what it writes passes `tuner check`, a second call edits, and what is wrong is one error."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuner import cli, pipeline
from tuner.assembly import assemble
from tuner.config.load import plain_data, raw_config
from tuner.testing.clips import render_folder
from tuner_wan.tiny import build_tiny_t2v

Call = Callable[..., int]
CONFIG, LIST, LIBRARY = (
    Path("config") / name for name in ("config.json", "multidatabackend.json", "user_prompt_library.json")
)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configure")
    build_tiny_t2v(folder / "model")
    render_folder(folder / "clips", count=4)
    return folder


@pytest.fixture
def call(tmp_path: Path, material: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run ``tuner WORDS`` in a folder with a tiny model and clips; its exit code."""
    shutil.copytree(material, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for variable in ("TRAINER_EXTRA_ARGS", "WAN_FEED_FORWARD_CHUNK_SIZE", "RANK"):
        monkeypatch.delenv(variable, raising=False)

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["tuner", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0)

    return run


def backups() -> list[str]:
    return sorted(path.name.split(".json.")[0] for path in Path("config").glob("*.bak"))


def clips_entry() -> dict[str, Any]:
    entry: dict[str, Any] = plain_data(LIST)[0]
    return entry


def test_what_is_written_passes_check_and_says_why(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--clips", "clips", "--base", "model", "--teach", "character", "--trigger", "ohwx", "--card", "RTX 4090")
    assert call("configure", "--yes", *flags, "--learning_rate", "5e-5") == 0
    out = capsys.readouterr().out
    assert "4 clips: 96x64 to 128x72" in out
    assert "of 22.3 GiB" in out
    written = raw_config(CONFIG)
    assert written["learning_rate"] == 5e-5
    assert written["plan_card"] == "RTX 4090"
    assert written["model_flavour"] == "t2v-480p-1.3b-2.1"
    lines = CONFIG.read_text().splitlines()
    assert all(" // " in line for line in lines if line.startswith('  "')), "every choice has its reason"
    entry = clips_entry()
    assert entry["caption_prepend"] == "ohwx,", "no caption mentions it"
    assert entry["resolution"] == 64, "no clip is enlarged"
    assert entry["video"] == {"frame_buckets": [17, 33], "min_frames": 17}
    assert any("ohwx" in prompt for prompt in plain_data(LIBRARY).values())
    assert call("check") == 0
    survey = pipeline.survey(assemble(raw_config(CONFIG)))
    assert len(survey.prepared.samples) == 4
    assert all(caption.startswith("ohwx,") for sample in survey.prepared.samples for caption in sample.captions)


def test_a_second_call_edits_what_was_answered_anew_and_keeps_the_rest(call: Call) -> None:
    assert call("configure", "--yes", "--clips", "clips", "--base", "model", "--card", "none") == 0
    before = CONFIG.read_text()
    assert call("configure", "--yes") == 0
    assert CONFIG.read_text() == before
    assert backups() == []
    own = before.replace('  "seed": 42,', '  // mine\n  "--lora_alpha": 16, // also mine\n  "seed": 7,')
    own = own.replace('  "optimizer": "adamw", // the usual one\n', "")
    CONFIG.write_text(own)
    LIST.write_text(LIST.read_text().replace('"repeats": 0,', '"repeats": 3, // seldom'))
    assert call("configure", "--yes", "--teach", "motion", "--max_train_steps", "1200") == 0
    after = CONFIG.read_text()
    assert '  // mine\n  "--lora_alpha": 16, // also mine\n  "seed": 7, // the same seed' in after
    written = raw_config(CONFIG)
    assert (written["flow_schedule_shift"], written["lora_rank"], written["max_train_steps"]) == (5.0, 32, 1200)
    assert "optimizer" not in written, "what was taken out stays out"
    assert '"repeats": 3, // seldom' in LIST.read_text(), "no answer about the data changed"
    assert backups() == ["config"]
    assert next(Path("config").glob("config.json.*.bak")).read_text() == own
    assert call("configure", "--yes", "--trigger", "ohwx") == 0
    assert clips_entry()["caption_prepend"] == "ohwx,"
    assert '"repeats": 3, // seldom' in LIST.read_text(), "the answer is about captions"
    assert call("configure", "--yes", "--trigger", "-", "--frames", "20") == 0
    assert "caption_prepend" not in clips_entry()
    assert clips_entry()["video"] == {"num_frames": 17, "min_frames": 17}
    assert call("check") == 0


def test_levers_follow_the_card(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    """What the planner chose for a small card goes when a large one comes."""
    large = ("--clips", "clips", "--model", "t2v-480p-14b-2.1")
    assert call("configure", "--yes", *large, "--card", "24G", "--base_model_precision", "no_change") == 0
    assert "of 22.8 GiB" in capsys.readouterr().out
    written = raw_config(CONFIG)
    assert written["enable_group_offload"] is True
    assert "without it" in next(line for line in CONFIG.read_text().splitlines() if "enable_group_offload" in line)
    assert call("configure", "--yes", "--card", "H200") == 0
    written = raw_config(CONFIG)
    assert "enable_group_offload" not in written
    assert written["plan_card"] == "H200"
    assert written["gradient_checkpointing"] is False, "there is room"
    assert call("configure", "--yes", "--card", "139G") == 0
    assert raw_config(CONFIG)["gradient_checkpointing"] is False, "the same lever, for another card"
    assert "plan_card" not in raw_config(CONFIG)


def test_other_clips_take_the_place_of_the_first_entry(call: Call) -> None:
    assert call("configure", "--yes", "--clips", "clips", "--base", "model", "--card", "none") == 0
    other = {
        "id": "mine",
        "dataset_type": "eval",
        "instance_data_dir": "clips",
        "resolution": 64,
        "video": {"num_frames": 9},
    }
    LIST.write_text(json.dumps([*plain_data(LIST), other], indent=2))
    Path("clips").rename("others")
    Path("clips").mkdir()
    shutil.copy("others/clip-00.mp4", "clips")
    shutil.copy("others/clip-00.txt", "clips")
    assert call("configure", "--yes", "--clips", "others") == 0
    listed = plain_data(LIST)
    assert [each["id"] for each in listed] == ["others", "text-embeds", "mine"]
    assert listed[0]["instance_data_dir"] == "others"
    assert listed[2] == other
    assert raw_config(CONFIG)["output_dir"] == "output/others"
    assert call("check") == 0


def test_a_config_written_by_hand_is_completed(call: Call) -> None:
    Path("config").mkdir()
    CONFIG.write_text('{"--model_family": "wan", "pretrained_model_name_or_path": "model", "lora_rank": 4}')
    assert call("configure", "--yes", "--clips", "clips", "--card", "none") == 0
    written = raw_config(CONFIG)
    assert (written["lora_rank"], written["pretrained_model_name_or_path"]) == (4, "model")
    assert '"--model_family": "wan"' in CONFIG.read_text()
    assert call("check") == 0


def test_a_list_of_datasets_may_be_in_the_config_itself(call: Call) -> None:
    assert call("configure", "--yes", "--clips", "clips", "--base", "model", "--card", "none") == 0
    config = raw_config(CONFIG) | {"data_backend_config": plain_data(LIST)}
    CONFIG.write_text(json.dumps(config))
    LIST.unlink()
    words = ("--trigger", "ohwx", "--frames", "9", "--prompt", "a red | blue thing", "--prompt", "second")
    assert call("configure", "--yes", "--clips", "clips", *words) == 0
    assert not LIST.exists()
    entry = raw_config(CONFIG)["data_backend_config"][0]
    assert (entry["caption_prepend"], entry["video"]) == ("ohwx,", {"num_frames": 9, "min_frames": 9})
    assert list(plain_data(LIBRARY).values()) == ["a red | blue thing", "second"]
    assert call("check") == 0


def test_a_list_that_cannot_be_edited_is_refused(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config").mkdir()
    Path("config/data.yaml").write_text("- {id: a, dataset_type: video, instance_data_dir: clips}\n")
    CONFIG.write_text('{"model_family": "wan", "data_backend_config": "config/data.yaml"}')
    assert call("configure", "--yes", "--clips", "clips", "--card", "none") == 2
    assert "lists of datasets in JSON alone" in capsys.readouterr().err
    assert backups() == []


def test_files_without_captions_take_one_for_all_or_are_named(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    Path("clips/clip-01.txt").unlink()
    flags = ("configure", "--yes", "--clips", "clips", "--base", "model", "--card", "none")
    assert call(*flags) == 2
    assert "1 of 4 files have no caption: clip-01.mp4" in capsys.readouterr().err
    assert not CONFIG.exists()
    assert call(*flags, "--caption", "a moving shape", "--trigger", "ohwx") == 0
    assert clips_entry()["instance_prompt"] == "ohwx, a moving shape"
    assert call("check") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--yes",), "nobody says --clips"),
        (("--yes", "--clips", "nowhere"), "there is no folder 'nowhere'"),
        (("--yes", "--clips", "model"), "there are no clips in this folder"),
        (("--yes", "--clips", "clips", "--teach", "singing"), "'singing' is none of them"),
        (("--yes", "--clips", "clips", "--card", "RTX 4900"), "did you mean 'RTX 4090'?"),
        (("--yes", "--clips", "clips", "--model", "t2v-480p-1.3b"), "did you mean 't2v-480p-1.3b-2.1'?"),
        (("--yes", "--clips", "clips", "--lora_rnk", "8"), "there is no config key 'lora_rnk'"),
        (("--yes", "--clips", "clips", "--lora_rank", "many"), "lora_rank cannot be 'many'"),
        (("--yes", "--clips", "clips", "--base", "model", "--card", "1G"), "nothing fits"),
        (("--clips", "clips"), "there is no terminal here"),
    ],
)
def test_what_is_wrong_is_one_error_and_nothing_is_written(
    words: tuple[str, ...], said: str, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("configure", *words) == 2
    assert said in capsys.readouterr().err
    assert not Path("config").exists()
