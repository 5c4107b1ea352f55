"""What validation renders, with a real model of the toy family."""

from __future__ import annotations

import json
import logging

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tuner.builtin.sampling import SamplingPlugin
from tuner.builtin.sampling.settings import parse_resolution, settings_for
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.materialise import materialise
from tuner.model import EncodeBatch
from tuner.run import Run
from tuner.testing.toy import build_toy
from tuner.testing.toy.describe import describe
from tuner.testing.toy.model import encode, load

torch.set_num_threads(1)
CPU = torch.device("cpu")
LONG = "a red circle moves slowly over a white wall"


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return build_toy(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture
def make_run(tmp_path, toy_folder):
    def make(**keys):
        keys = {"validation_num_inference_steps": 2, **keys}
        core = CoreConfig(output_dir=tmp_path / "out", pretrained_model_name_or_path=str(toy_folder), **keys)
        run = Run(core, plugins={}, explicit=frozenset(keys), spec=describe(core))
        run.place(CPU, torch.float32)
        return run

    return make


@pytest.fixture
def plugin():
    return SamplingPlugin("sampling", SamplingPlugin.Config())


@pytest.fixture
def library(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"cat": "a cat", "two dogs": "two dogs that run"}))
    return path


def loaded(run, plugin):
    """The model with its weights, and the text cache of what the plugin asked to encode."""
    model = load(run)
    materialise(model.network, device=CPU)
    model.network.module.eval()
    captions = list(plugin.extra_captions(run=run))
    with torch.no_grad():
        cached = dict(zip(captions, encode(model, EncodeBatch("text", captions=tuple(captions))), strict=True))
    run.text_cache = cached.__getitem__
    return model


def validated(run, plugin):
    model = loaded(run, plugin)
    with torch.no_grad():
        return model, plugin.validate(run=run, model=model)


def decoded(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_every_prompt_gets_a_clip_a_poster_and_a_row(make_run, plugin, library, tmp_path):
    run = make_run(
        validation_prompt="a red circle",
        user_prompt_library=library,
        validation_resolution="64x48",
        validation_num_video_frames=9,
    )
    run.step = 20
    _, validation = validated(run, plugin)

    folder = tmp_path / "out" / "validation" / "step-20"
    names = {"validation.mp4", "validation.png", "cat.mp4", "cat.png", "two_dogs.mp4", "two_dogs.png"}
    assert {path.name for path in validation.media} == names | {"contact-sheet.png"}
    assert {path.name for path in folder.iterdir()} == names | {"contact-sheet.png", "validation.json"}
    assert decoded(folder / "cat.mp4").shape == (9, 48, 64, 3)
    assert Image.open(folder / "cat.png").size == (64, 48)
    assert Image.open(folder / "contact-sheet.png").height > 3 * 156


def test_a_clip_is_what_the_model_samples_and_decodes(make_run, plugin, tmp_path):
    run = make_run(validation_prompt="a red circle", validation_resolution="48x32", validation_num_video_frames=5)
    model, _ = validated(run, plugin)
    record = json.loads((tmp_path / "out/validation/step-0/validation.json").read_text())

    # From the record alone, as someone would who wants to see it again.
    again = settings_for(run, run.spec)[0]
    assert again.record() == record["settings"]
    text, negative = (run.text_cache(each) for each in (record["prompts"][0]["prompt"], record["settings"]["negative"]))
    with torch.no_grad():
        frames = model.decode(model.sample(again.request(text, negative, None))).numpy()
    written = np.asarray(Image.open(tmp_path / "out/validation/step-0/validation.png"))
    assert np.array_equal(written, frames[len(frames) // 2])


def test_the_record_holds_everything_and_nothing_of_the_machine(make_run, plugin, tmp_path):
    run = make_run(
        validation_prompt="x", validation_negative_prompt="ugly", validation_seed=3, validation_guidance=2.5,
        validation_resolution="32", validation_num_video_frames=5, validation_flow_shift=3, seed=1,
    )  # fmt: skip
    validated(run, plugin)
    record = json.loads((tmp_path / "out/validation/step-0/validation.json").read_text())
    assert record["settings"] == {
        "width": 32, "height": 32, "frames": 5, "fps": 16.0, "steps": 2, "guidance": 2.5,
        "guidance_2": None, "seed": 3,
        "scheduler": "unipc", "flow_shift": 3.0, "negative": "ugly",
    }  # fmt: skip
    assert record["model"] == {"family": "toy", "flavour": "toy", "base": "model", "network": "transformer"}
    assert record["prompts"] == [
        {"nickname": "validation", "prompt": "x", "files": ["validation.mp4", "validation.png"]}
    ]


def test_the_decoder_is_loaded_once_and_after_all_sampling(make_run, plugin, library, monkeypatch):
    run = make_run(user_prompt_library=library, validation_resolution="32", validation_num_video_frames=5)
    model = loaded(run, plugin)
    events = []
    load_vae, sample = model.components["vae"].load, model.sample
    object.__setattr__(model.components["vae"], "load", lambda: events.append("vae") or load_vae())
    monkeypatch.setattr(model, "sample", lambda request: events.append("sample") or sample(request))
    with torch.no_grad():
        plugin.validate(run=run, model=model)
    assert events == ["sample", "sample", "vae"]
    assert not model._held


def test_prompts_and_the_negative_prompt_are_asked_to_be_encoded(make_run, plugin, library):
    run = make_run(validation_prompt="p", user_prompt_library=library, validation_negative_prompt="n")
    assert list(plugin.extra_captions(run=run)) == ["p", "a cat", "two dogs that run", "n"]


def test_without_prompts_nothing_is_encoded_or_rendered_and_one_line_says_so(make_run, plugin, tmp_path, caplog):
    run = make_run()
    plugin.configure(run=run)
    assert list(plugin.extra_captions(run=run)) == []
    assert plugin.validate(run=run, model=None) is None
    assert [record.getMessage() for record in caplog.records] == [
        "validation renders nothing: there is no validation_prompt, no user_prompt_library, and no "
        "validation_prompt_library"
    ]
    assert not (tmp_path / "out").exists()


def test_wishes_that_the_model_does_not_allow_are_said_once(make_run, plugin, caplog):
    run = make_run(validation_prompt=LONG, validation_resolution="50x40", validation_num_video_frames=8)
    plugin.check_model(run=run, spec=run.spec)
    _, validation = validated(run, plugin)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "50x40: rendered at 48x48" in lines[0]
    assert "8: rendered with 5" in lines[1]
    assert decoded(next(path for path in validation.media if path.suffix == ".mp4")).shape == (5, 48, 48, 3)


def test_the_trained_shape_is_the_default(make_run):
    run = make_run(resolution=100)
    run.trained_shape = (13, 32, 96)
    settings, notes = settings_for(run, run.spec)
    assert (settings.width, settings.height, settings.frames, notes) == (96, 32, 13, [])
    run.trained_shape = None
    assert settings_for(run, run.spec)[0].width == 96  # 100, to the nearest multiple of 16


def test_the_models_own_defaults_yield_to_the_users(make_run):
    from dataclasses import replace

    run = make_run(validation_guidance=7.0)
    spec = replace(run.spec, defaults={"validation_guidance": 4.0, "validation_flow_shift": 3.0})
    settings, _ = settings_for(run, spec)
    assert (settings.guidance, settings.flow_shift) == (7.0, 3.0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("832x480", (832, 480)), (" 832 X 480 ", (832, 480)), ("832×480", (832, 480)), ("480", (480, 480))],
)
def test_resolutions(text, size):
    assert parse_resolution(text) == size


@pytest.mark.parametrize("text", ["", "big", "832x", "0x480", "-1x5", "832x480x81", "832.5x480"])
def test_what_is_no_resolution_is_refused_before_weights_are_read(make_run, plugin, text):
    with pytest.raises(ConfigError, match="is no size"):
        plugin.configure(run=make_run(validation_resolution=text))


def test_placeholders_are_warned_about(make_run, plugin, caplog):
    plugin.configure(run=make_run(validation_prompt="a <token> at sea"))
    assert "prompts are rendered with <token> as it stands" in caplog.text


def test_one_frame_is_a_picture(make_run, plugin):
    run = make_run(validation_prompt="p", validation_resolution="32", validation_num_video_frames=1)
    _, validation = validated(run, plugin)
    assert [path.name for path in validation.media] == ["validation.png", "contact-sheet.png"]


def test_a_diverged_model_is_said_and_the_rest_is_rendered(make_run, plugin, library, tmp_path, caplog, monkeypatch):
    run = make_run(user_prompt_library=library, validation_resolution="32", validation_num_video_frames=5)
    model = loaded(run, plugin)
    sample = model.sample
    first = run.text_cache("a cat")["states"]
    monkeypatch.setattr(
        model,
        "sample",
        lambda request: sample(request) * (float("nan") if torch.equal(request.prompt["states"], first) else 1),
    )
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        validation = plugin.validate(run=run, model=model)
    assert [path.name for path in validation.media] == ["two_dogs.mp4", "two_dogs.png", "contact-sheet.png"]
    assert "'cat' gave non-finite latents" in caplog.text
    record = json.loads((tmp_path / "out/validation/step-0/validation.json").read_text())
    assert record["prompts"][0] == {
        "nickname": "cat", "prompt": "a cat", "files": [], "failed": "non-finite latents"
    }  # fmt: skip


def test_steps_done_are_counted_over_all_prompts(make_run, plugin, library, monkeypatch):
    from contextlib import contextmanager

    from tuner.builtin.sampling import render

    seen = []

    @contextmanager
    def bar(description, total, *, show=True):
        seen.append(total)
        yield seen.append

    monkeypatch.setattr(render, "progress", bar)
    run = make_run(user_prompt_library=library, validation_resolution="32", validation_num_video_frames=5)
    validated(run, plugin)
    assert seen[0] == 4
    assert sum(seen[1:]) == 4
