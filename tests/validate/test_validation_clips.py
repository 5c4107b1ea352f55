"""When clips are rendered, of what, and beside what: whole runs on the toy family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tuner import pipeline
from tuner.assembly import assemble
from tuner.builtin.sampling import SamplingPlugin, render
from tuner.builtin.sampling.advice import advice, refuse
from tuner.builtin.sampling.clips import clips
from tuner.builtin.sampling.prompts import Prompt, built_in, slug, validation_prompts
from tuner.builtin.sampling.settings import settings_for
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError, ConfigErrors, PluginError
from tuner.model import LayerSkip
from tuner.run import Run
from tuner.testing.clips import render_clip
from tuner.testing.killing import start_several
from tuner.testing.plugin_env import importable, toy_distribution
from tuner.testing.toy import build_toy
from tuner.testing.toy.describe import describe

torch.set_num_threads(1)
PROMPT = "a red square moves slowly over a white wall"
CLIPS = {
    "validation_prompt": PROMPT,
    "validation_num_inference_steps": 2,
    "validation_resolution": "64x64",
    "validation_num_video_frames": 5,
}


class Job:
    """A toy model and two clips."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.distribution = folder, toy_distribution(folder / "site")
        self.model = build_toy(folder / "model")
        for index in range(2):
            render_clip(folder / f"clips/{index}.mp4", width=64, height=64, frames=5, fps=16, seed=index)
            (folder / f"clips/{index}.txt").write_text(f"shapes number {index}", encoding="utf-8")

    def config(self, output: str, **keys: Any) -> dict[str, Any]:
        data: dict[str, Any] = {
            "id": "clips",
            "type": "local",
            "dataset_type": "video",
            "instance_data_dir": f"{self.folder}/clips",
        }
        data |= {"cache_dir_vae": f"{self.folder}/cache", "caption_strategy": "textfile", "resolution": 64}
        data |= {"resolution_type": "pixel_area", "video": {"num_frames": 5, "min_frames": 5}}
        text: dict[str, Any] = {
            "id": "text",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": f"{self.folder}/text",
        }
        own: dict[str, Any] = {
            "model_family": "toy",
            "pretrained_model_name_or_path": str(self.model),
            "mixed_precision": "no",
        }
        own |= {"output_dir": str(self.folder / output), "max_train_steps": 2, "learning_rate": 0.05, "lora_rank": 4}
        return own | {"data_backend_config": [data, {**text, "type": "local"}]} | CLIPS | keys

    def run(self, output: str, **keys: Any) -> Path:
        with importable(self.distribution):
            pipeline.run(assemble(self.config(output, **keys)))
        return self.folder / output


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    (folder / "clips").mkdir()
    return Job(folder)


def decoded(path: Path) -> np.ndarray[Any, Any]:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def names(output: Path, step: int) -> set[str]:
    return {path.name for path in (output / "validation" / f"step-{step}").iterdir()}


# --- the base -----------------------------------------------------------------------------------------------


def test_the_base_is_rendered_before_the_first_step_and_shown_beside(job: Job) -> None:
    output = job.run("base")
    files = {"validation@base.mp4", "validation@base.png", "validation@base.json", "contact-sheet@base.png"}
    assert names(output, 0) == files
    again = job.run("base-alone", disable_benchmark=True)
    assert not (again / "validation" / "step-0").exists()
    before, after = (output / "validation" / each for each in ("step-0/validation@base.mp4", "step-2/validation.mp4"))
    assert not np.array_equal(decoded(before), decoded(after))
    assert np.array_equal(decoded(after), decoded(again / "validation/step-2/validation.mp4"))
    sheets = [Image.open(each / "validation/step-2/contact-sheet.png").height for each in (output, again)]
    assert sheets[0] > sheets[1], "a row more"


def test_the_base_is_the_network_without_a_lora_that_was_given(job: Job) -> None:
    trained = job.run("given", max_train_steps=4, disable_benchmark=True)
    start = trained / "checkpoint-4" / "pytorch_lora_weights.safetensors"
    output = job.run("from-given", init_lora=str(start), max_train_steps=1)
    plain = job.run("base-again", max_train_steps=1)
    first, second = (decoded(each / "validation/step-0/validation@base.mp4") for each in (output, plain))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, decoded(trained / "validation/step-4/validation.mp4"))


def test_it_is_rendered_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    sampled = render._sampled

    def counted(run: Run, *rest: Any) -> Any:
        seen.append(run.variant)
        return sampled(run, *rest)

    monkeypatch.setattr(render, "_sampled", counted)
    job.run("once", max_train_steps=1)
    job.run("once", max_train_steps=2, resume_from_checkpoint="latest")
    assert seen == ["base", "", ""]
    # Killed before the first checkpoint: it starts anew, and its clips are there.
    folder = job.folder / "once"
    for each in folder.glob("checkpoint-*"):
        each.rename(folder / f"gone-{each.name}")
    (folder / "train.jsonl").unlink()
    job.run("once", max_train_steps=1)
    assert seen == ["base", "", "", ""]
    (folder / "validation/step-0/validation@base.mp4").unlink()
    for each in folder.glob("checkpoint-*"):
        each.rename(folder / f"gone-again-{each.name}")
    job.run("once", max_train_steps=1)
    assert seen == ["base", "", "", "", "base", ""]


# --- when, and of what --------------------------------------------------------------------------------------


def test_clips_at_the_end_of_epochs(job: Job) -> None:
    output = job.run("epochs", max_train_steps=5, validation_epoch_interval=1, disable_benchmark=True)
    assert sorted(each.name for each in (output / "validation").iterdir()) == ["step-2", "step-4", "step-5"]


def test_several_sizes_strengths_and_settings_of_a_prompts_own(job: Job) -> None:
    library = job.folder / "library.json"
    own = {"prompt": "two dogs run over a meadow", "seed": 7, "resolution": "32", "num_video_frames": 1}
    library.write_text(json.dumps({"dogs": {**own, "negative_prompt": "ugly"}}), encoding="utf-8")
    output = job.run(
        "sizes",
        user_prompt_library=str(library),
        validation_resolution="64x48,48x64",
        validation_adapter_strength=[0, 1],
    )
    found = {name for name in names(output, 2) if name.endswith((".mp4", ".png"))}
    strengths = ("strength-0", "strength-1")
    media = {f"validation_{size}_{each}.mp4" for size in ("64x48", "48x64") for each in strengths}
    media |= {f"{Path(each).stem}.png" for each in media} | {f"dogs_{each}.png" for each in strengths}
    assert found == media | {"contact-sheet.png"}
    folder = output / "validation"
    assert decoded(folder / "step-2/validation_48x64_strength-1.mp4").shape == (5, 64, 48, 3)
    without = decoded(folder / "step-2/validation_64x48_strength-0.mp4")
    assert np.array_equal(without, decoded(folder / "step-0/validation_64x48@base.mp4"))
    assert not np.array_equal(without, decoded(folder / "step-2/validation_64x48_strength-1.mp4"))
    assert Image.open(folder / "step-2/dogs_strength-1.png").size == (32, 32)
    record = json.loads((folder / "step-2/validation.json").read_text(encoding="utf-8"))
    entry = next(each for each in record["prompts"] if each["nickname"] == "dogs · strength 1")
    assert (entry["settings"]["seed"], entry["settings"]["negative"]) == (7, "ugly")


def test_strengths_of_a_network_that_is_trained_itself_are_refused(job: Job) -> None:
    with pytest.raises(ConfigError, match="has no other strength"):
        job.run("full", model_type="full", validation_adapter_strength=0.5)


def test_two_processes_share_the_clips(job: Job) -> None:
    library = job.folder / "three.json"
    library.write_text(json.dumps({name: f"{name} walks along a wide river" for name in "abc"}), encoding="utf-8")
    keys = {"user_prompt_library": str(library), "max_train_steps": 1, "disable_benchmark": True}
    keys |= {"learning_rate": 1e-30}
    alone = job.run("clips-alone", **keys)
    ranks = start_several(job.config("clips-shared", **keys), [str(job.distribution)])
    for each in ranks:
        each.join(120)
    assert [each.exitcode for each in ranks] == [0, 0]
    shared = job.folder / "clips-shared"
    assert names(shared, 1) == names(alone, 1)
    for name in ("validation", "a", "b", "c"):
        ours, theirs = (decoded(each / f"validation/step-1/{name}.mp4") for each in (alone, shared))
        assert np.array_equal(ours, theirs)


# --- prompts ------------------------------------------------------------------------------------------------


def test_the_built_in_library_comes_after_the_users_own() -> None:
    core = CoreConfig(validation_prompt=PROMPT)
    found = validation_prompts(core, builtin=True)
    assert [each.nickname for each in found] == ["validation", *(f"library_{name}" for name in built_in())]
    assert len(built_in()) >= 10
    assert all(len(text.split()) >= 20 and slug(name) == name for name, text in built_in().items())


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"prompt": "a cat", "sed": 3}, "unknown setting 'sed'"),
        ({"prompt": "a cat", "seed": -3}, "validation_seed"),
        ({"prompt": "a cat", "num_video_frames": "many"}, "validation_num_video_frames"),
        ({"seed": 3}, "is null, not a text"),
    ],
)
def test_settings_of_a_prompt_are_checked(entry: Any, words: str, tmp_path: Path) -> None:
    library = tmp_path / "library.json"
    library.write_text(json.dumps({"cat": entry}), encoding="utf-8")
    with pytest.raises((ConfigError, ConfigErrors)) as refusal:
        validation_prompts(CoreConfig(user_prompt_library=library))
    assert words in str(refusal.value)
    assert "cat" in str(refusal.value)


def test_names_that_sizes_make_must_not_meet(tmp_path: Path) -> None:
    run = toy_run(tmp_path, validation_resolution="64x48,48x64")
    prompts = [Prompt("cat", "cat", "x"), Prompt("cat_64x48", "cat_64x48", "y", {"validation_resolution": "32"})]
    found, _ = clips(run, run.spec, prompts[:1])
    assert [each.prompt.slug for each in found] == ["cat_64x48", "cat_48x64"]
    with pytest.raises(ConfigError, match="would both be written to 'cat_64x48'"):
        clips(run, run.spec, prompts)


# --- what is said -------------------------------------------------------------------------------------------


def toy_run(tmp_path: Path, config: Any = None, **keys: Any) -> Any:
    model = build_toy(tmp_path / "model")
    core = CoreConfig(output_dir=tmp_path / "out", pretrained_model_name_or_path=str(model), **keys)
    plugin = SamplingPlugin("sampling", config or SamplingPlugin.Config())
    return Run(core, plugins={"sampling": plugin}, explicit=frozenset(keys), spec=describe(core))


def said(tmp_path: Path, own: dict[str, Any], explicit: tuple[str, ...] = (), prompt: str = PROMPT) -> list[str]:
    config = SamplingPlugin.Config(**own)
    run = toy_run(tmp_path, config, validation_num_inference_steps=20)
    found, _ = clips(run, run.spec, [Prompt("cat", "cat", prompt)])
    return list(advice(found, run.spec, config, frozenset((*explicit, *own))))


@pytest.mark.parametrize(
    ("own", "explicit", "prompt", "words"),
    [
        ({}, (), "a cat", "prompts of fewer than 6 words are rendered badly"),
        ({}, ("validation_guidance_2",), PROMPT, "validation_guidance_2 does nothing: toy has one denoiser"),
        ({"validation_guidance_skip_scale": 3.0}, (), PROMPT, "does nothing without validation_guidance_skip_layers"),
        (
            {"validation_guidance_skip_layers": [1], "validation_guidance_skip_layers_stop": 0.05},
            (),
            PROMPT,
            "does nothing in 20 steps",
        ),
        ({"validation_guidance_skip_layers": [1], "validation_guidance_skip_scale": 0}, (), PROMPT, "skip_scale is 0"),
    ],
)
def test_what_makes_clips_worse_is_said(
    own: dict[str, Any], explicit: tuple[str, ...], prompt: str, words: str, tmp_path: Path
) -> None:
    [line] = said(tmp_path, own, explicit, prompt)
    assert words in line
    assert said(tmp_path, {"validation_guidance_skip_layers": [1]}, prompt="两只拟人化的猫咪身穿舒适的拳击装备") == []


def test_blocks_and_windows_that_there_are_not_are_refused(tmp_path: Path) -> None:
    spec = toy_run(tmp_path).spec
    with pytest.raises(ConfigError, match="names 99"):
        refuse(SamplingPlugin.Config(validation_guidance_skip_layers=[1, 99]), spec)
    keys = {"validation_guidance_skip_layers_start": 0.5, "validation_guidance_skip_layers_stop": 0.3}
    with pytest.raises(ConfigError, match="after validation_guidance_skip_layers_stop"):
        refuse(SamplingPlugin.Config(validation_guidance_skip_layers=[1], **keys), spec)


@pytest.mark.parametrize("own", [{"validation_guidance_skip_layers": [0]}, {"validation_guidance_rescale": 0.5}])
def test_a_family_that_does_not_know_a_guidance_refuses_it(job: Job, own: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match=next(iter(own))):
        job.run("unknown-guidance", **own)


def test_scores_of_pictures_are_refused_for_video(job: Job) -> None:
    with pytest.raises(ConfigError, match="says nothing of motion"):
        job.run("clip-score", evaluation_type="clip")


def test_guidance_options_reach_the_request_and_the_record(tmp_path: Path) -> None:
    config = SamplingPlugin.Config(
        validation_guidance_skip_layers=[9], validation_guidance_skip_layers_stop=1.0, validation_guidance_rescale=0.7
    )
    run = toy_run(tmp_path, config)
    settings, _ = settings_for(run, run.spec)
    request = settings.request({}, {}, None)
    assert request.layer_skip == LayerSkip((9,), 2.8, 0.01, 1.0)
    assert request.rescale == 0.7
    assert settings.record()["skip_layers"] == (9,)
    assert "skip_layers" not in settings_for(toy_run(tmp_path / "plain"), run.spec)[0].record()
