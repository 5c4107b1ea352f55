"""``tuner sample``: what it renders is what diffusers renders of the same files, and it overwrites nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from typer.testing import CliRunner

from tuner.builtin.adapter_file import AdapterFile, low_rank, save
from tuner.builtin.adapter_formats import models
from tuner.builtin.adapter_names import FORMATS
from tuner.cli import app
from tuner.errors import CheckpointError, ConfigError, Stopped
from tuner.files import sha256_of
from tuner_wan import loading
from tuner_wan.model import WanModel
from tuner_wan.tiny import build_tiny

torch.set_num_threads(1)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the command renders, too."""
PROMPT, NEGATIVE = "a red circle", "ugly"
SIZE = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 5.0}
FLAGS = (
    "--validation_resolution", "48x32", "--validation_num_video_frames", "5", "--validation_guidance", "5",
    "--validation_num_inference_steps", "3", "--negative_prompt", NEGATIVE, "--mixed_precision", "no",
    "--model_family", "wan",  # other tests of the same process may have made another one known
)  # fmt: skip
BOTH = "t2v-14b-2.2-both"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a flavour. Read only."""
    root = tmp_path_factory.mktemp("bases")

    def of(flavour: str) -> Path:
        return root / flavour if (root / flavour).exists() else build_tiny(root / flavour, flavour, layers=4)

    return of


@pytest.fixture
def t2v(base: Callable[[str], Path]) -> Path:
    return base("t2v-480p-1.3b-2.1")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def adapter(model: Path, path: Path, form: str = "diffusers", seed: int = 0, metadata: Mapping[str, str] = {}) -> Path:
    """A LoRA of every matrix in the blocks of a model's first denoiser."""
    target, draw = models.targets(model)[0], torch.Generator().manual_seed(seed)
    updates = {
        module: low_rank(
            torch.randn(4, shape[1], generator=draw) * 0.4, torch.randn(shape[0], 4, generator=draw) * 0.4, 6.0
        )
        for module, shape in target.shapes.items()
        if module.startswith("blocks.") and len(shape) == 2
    }
    tensors, said = FORMATS[form].write(AdapterFile(updates), target.spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(tensors, {**said, **metadata}, path)
    return path


def sample(model: Path, *arguments: object, flavour: str | None = None, prompt: bool = True) -> str:
    """The output of the command; what it raises otherwise."""
    words = ["sample", "--pretrained_model_name_or_path", model, *FLAGS, *(("--prompt", PROMPT) if prompt else ())]
    words += [] if flavour is None else ["--model_flavour", flavour]
    done = CliRunner().invoke(app, [str(each) for each in (*words, *arguments)])
    if done.exception is not None:
        raise done.exception
    return done.output


def poster(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def rendered(pipeline: Any, seed: int, *arguments: Any, **changes: Any) -> np.ndarray:
    """The middle frame of what diffusers renders."""
    generator = torch.Generator().manual_seed(seed)
    settings = {**SIZE, "prompt": PROMPT, "negative_prompt": NEGATIVE, **changes}
    frames = pipeline(*arguments, generator=generator, output_type="pil", **settings).frames[0]
    return np.asarray(frames[len(frames) // 2])


def alike(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal but for the rounding of a last bit."""
    return ours.shape == theirs.shape and int(np.abs(ours.astype(int) - theirs.astype(int)).max()) <= 1


def test_every_strength_and_seed_is_what_diffusers_renders(t2v: Path, tmp_path: Path) -> None:
    lora = adapter(t2v, tmp_path / "my.safetensors")
    told = sample(t2v, "--lora", lora, "--strengths", "0,0.5,1", "--seeds", "3,4", "--output", "out")
    assert "wrote 6 clips" in told
    pipeline = WanPipeline.from_pretrained(t2v).to(DEVICE)
    bare = rendered(pipeline, 3)
    assert alike(poster("out/a_red_circle_strength-0_seed-3.png"), bare)
    pipeline.load_lora_weights(tmp_path, weight_name=lora.name, adapter_name="my")
    for strength, seed in ((0.5, 3), (1, 3), (1, 4)):
        pipeline.set_adapters(["my"], [strength])
        expected = rendered(pipeline, seed)
        assert alike(poster(f"out/a_red_circle_strength-{strength:g}_seed-{seed}.png"), expected)
        assert not alike(expected, bare)


def test_strength_0_is_the_base_and_formats_and_shares_mean_the_same(t2v: Path, tmp_path: Path) -> None:
    files = {form: adapter(t2v, tmp_path / f"{form}.safetensors", form) for form in FORMATS if form != "peft"}
    sample(t2v, "--output", "bare", "--seeds", "1")
    for form, file in files.items():
        sample(t2v, "--lora", file, "--strengths", "0,0.5", "--output", form, "--seeds", "1")
    sample(
        t2v, "--lora", f"{files['kohya']}=0.25", "--lora", f"{files['comfyui']}=0.25", "--output", "two", "--seeds", "1"
    )
    bare = poster("bare/a_red_circle_seed-1.png")
    half = poster("comfyui/a_red_circle_strength-0.5_seed-1.png")
    assert not alike(half, bare)
    for form in files:
        assert np.array_equal(poster(f"{form}/a_red_circle_strength-0_seed-1.png"), bare)
        assert alike(poster(f"{form}/a_red_circle_strength-0.5_seed-1.png"), half)
    assert alike(poster("two/a_red_circle_strength-1_seed-1.png"), half)


def test_each_expert_has_its_file(base: Callable[[str], Path], tmp_path: Path) -> None:
    model = base(BOTH)
    high = adapter(model, tmp_path / "run/pytorch_lora_weights.high_noise.safetensors", seed=1)
    low = adapter(model, tmp_path / "run/pytorch_lora_weights.low_noise.safetensors", seed=2)
    sample(model, "--lora", "run", "--output", "folder", "--seeds", "3", flavour=BOTH)
    by_hand = high.rename(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"does not say which one.*\n.*\n.*--lora high_noise:a.safetensors"):
        sample(model, "--lora", by_hand, flavour=BOTH)
    told = sample(
        model, "--lora", f"high_noise:{by_hand}", "--lora", f"low_noise:{low}=1", "--output", "said", "--seeds", "3",
        flavour=BOTH,
    )  # fmt: skip
    pipeline = WanPipeline.from_pretrained(model).to(DEVICE)
    bare = rendered(pipeline, 3, guidance_scale_2=5.0)
    pipeline.load_lora_weights(tmp_path, weight_name=by_hand.name, adapter_name="high")
    pipeline.load_lora_weights(low.parent, weight_name=low.name, adapter_name="low", load_into_transformer_2=True)
    expected = rendered(pipeline, 3, guidance_scale_2=5.0)
    name = "a_red_circle_strength-1_seed-3.png"
    assert not alike(expected, bare)
    assert alike(poster(f"folder/{name}"), expected)
    assert np.array_equal(poster(f"said/{name}"), poster(f"folder/{name}"))
    assert "no adapter is for" not in told
    told = sample(model, "--lora", f"high_noise:{by_hand}", "--output", "one", flavour=BOTH)
    assert "no adapter is for low_noise, which renders its steps as it comes" in told


def test_a_clip_starts_from_a_picture(base: Callable[[str], Path], tmp_path: Path) -> None:
    flavour = "i2v-14b-2.2-high"
    model = base(flavour)
    with pytest.raises(ConfigError, match=r"renders from first frame, and there is none"):
        sample(model, flavour=flavour)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "start.png")
    lora = adapter(model, tmp_path / "my.safetensors")
    sample(
        model, "--lora", lora, "--strengths", "0.5", "--output", "out", "--seeds", "3",
        "--validation_images", tmp_path / "start.png", flavour=flavour,
    )  # fmt: skip
    pipeline = WanImageToVideoPipeline.from_pretrained(model).to(DEVICE)
    pipeline.register_to_config(boundary_ratio=None)
    pipeline.load_lora_weights(tmp_path, weight_name=lora.name, adapter_name="my")
    pipeline.set_adapters(["my"], [0.5])
    expected = rendered(pipeline, 3, Image.open(tmp_path / "start.png"))
    assert alike(poster("out/a_red_circle_strength-0.5_seed-3.png"), expected)
    record = json.loads(Path("out/a_red_circle_strength-0.5_seed-3.json").read_text())
    assert record["images"] == {"first_frame": {"file": "start.png", "sha256": sha256_of(tmp_path / "start.png")}}


@pytest.mark.parametrize(
    "keys",
    [
        {"base_model_precision": "fp8-scaled"},
        {"enable_group_offload": "true"},
        {"enable_chunked_feed_forward": "true", "feed_forward_chunk_size": "5", "wan_lean_blocks": "true"},
        {"base_model_precision": "fp8-scaled", "enable_group_offload": "true", "group_offload_type": "leaf_level"},
    ],
    ids=lambda keys: "+".join(keys),
)
def test_quantised_streamed_and_rewritten_bases_take_adapters(keys: dict[str, str], t2v: Path, tmp_path: Path) -> None:
    lora = adapter(t2v, tmp_path / "my.safetensors")
    flags = [word for key, value in keys.items() for word in (f"--{key}", value)]
    sample(t2v, "--lora", lora, "--strengths", "0,1", "--output", "out", "--seeds", "1", *flags)
    sample(t2v, "--output", "out", "--seeds", "1", *flags)
    bare, adapted = (poster(f"out/a_red_circle_strength-{strength}_seed-1.png") for strength in (0, 1))
    assert np.array_equal(bare, poster("out/a_red_circle_seed-1.png"))
    sample(t2v, "--lora", lora, "--output", "plain", "--seeds", "1")
    plain = poster("plain/a_red_circle_strength-1_seed-1.png")
    moved, error = (np.abs(each.astype(int) - adapted.astype(int)).mean() for each in (bare, plain))
    if "base_model_precision" in keys:
        assert error < moved / 4, "a quantised base is a little off; the adapter is the same"
    else:
        assert alike(adapted, plain)


def test_a_training_config_is_enough_and_its_data_are_not_looked_at(t2v: Path, tmp_path: Path) -> None:
    config = {
        "model_family": "wan", "model_type": "full", "pretrained_model_name_or_path": str(t2v), "output_dir": "run",
        "data_backend_config": "gone.json", "validation_prompt": "a cat", "validation_resolution": "48x32",
        "validation_num_video_frames": 5, "validation_num_inference_steps": 1, "validation_seed": 8,
        "mixed_precision": "no", "push_to_hub": True, "report_to": "wandb", "validation_preview": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    lora = adapter(t2v, tmp_path / "my.safetensors")
    done = CliRunner().invoke(app, ["sample", "--config", "config.json", "--lora", str(lora), "--strengths", "1,-0.5"])
    assert done.exception is None, done.output
    for key in ("push_to_hub", "report_to", "validation_preview"):
        assert f"set aside: {key}" in done.output
    names = {f"validation_strength-{strength}_seed-8.mp4" for strength in ("1", "-0.5")}
    assert {path.name for path in Path("run/samples").glob("*.mp4")} == names
    done = CliRunner().invoke(app, ["sample", "--config", "config.json", "--prompt", "a dog", "--validation_seed", "9"])
    assert done.exception is None, done.output
    assert Path("run/samples/a_dog_seed-9.mp4").exists()
    assert not list(Path("run/samples").glob("validation_seed-*")), "typed prompts stand for the config's"


def test_the_record_holds_everything_and_the_clip_has_it_too(t2v: Path, tmp_path: Path) -> None:
    lora = adapter(t2v, tmp_path / "my.safetensors")
    sample(t2v, "--lora", f"{lora}=0.8", "--strengths", "0.5", "--output", "out", "--seeds", "7")
    record = json.loads(Path("out/a_red_circle_strength-0.5_seed-7.json").read_text())
    assert record["adapters"] == [
        {"file": "my.safetensors", "sha256": sha256_of(lora), "network": "transformer", "share": 0.8}
    ]
    assert (record["strength"], record["prompt"], record["model"]["base"]) == (0.5, PROMPT, t2v.name)
    settings = {"width": 48, "height": 32, "frames": 5, "steps": 3, "guidance": 5.0, "seed": 7, "negative": NEGATIVE}
    assert settings.items() <= record["settings"].items()
    assert {"scheduler", "flow_shift"} <= record["settings"].keys()
    files = record.pop("files")
    assert files == {name: sha256_of(Path("out") / name) for name in files}
    assert str(tmp_path) not in json.dumps(record), "nothing of the machine's folders"
    with av.open("out/a_red_circle_strength-0.5_seed-7.mp4") as container:
        assert json.loads(container.metadata["comment"]) == record
        assert len(list(container.decode(video=0))) == 5


def test_sizes_and_settings_of_a_prompts_own(t2v: Path, tmp_path: Path) -> None:
    library = tmp_path / "prompts.json"
    library.write_text(json.dumps({"cat": "a cat", "dog": {"prompt": "a dog", "seed": 5, "num_video_frames": 1}}))
    sample(t2v, "--output", "out", "--prompts", library, "--validation_resolution", "48x32,32x32", prompt=False)
    names = {"cat_48x32_seed-42", "cat_32x32_seed-42", "dog_48x32_seed-5", "dog_32x32_seed-5"}
    assert {path.stem for path in Path("out").glob("*.json")} == names
    assert {path.stem for path in Path("out").glob("*.mp4")} == {name for name in names if name.startswith("cat")}
    assert poster("out/dog_32x32_seed-5.png").shape == (32, 32, 3)


def test_a_grid_of_strengths_and_a_row_for_each_clip(t2v: Path, tmp_path: Path) -> None:
    lora = adapter(t2v, tmp_path / "my.safetensors")
    library = tmp_path / "prompts.json"
    library.write_text(json.dumps({"cat": "a cat", "dog": "a dog"}))
    flags = ("--lora", lora, "--output", "out", "--prompts", library)
    sample(t2v, *flags, "--strengths", "0,1", "--seeds", "1", prompt=False)
    assert {path.stem for path in Path("out").glob("*.mp4")} == {
        f"{name}_strength-{strength}_seed-1" for name in ("cat", "dog") for strength in (0, 1)
    }
    grid, rows = Image.open("out/grid.png"), Image.open("out/contact-sheet.png")
    assert grid.height < rows.height, "two rows beside four"
    before = sha256_of(Path("out/grid.png"))
    sample(t2v, *flags, "--strengths", "0,0.5,1", "--seeds", "1", prompt=False)
    assert sha256_of(Path("out/grid.png")) == before
    assert Image.open("out/grid-2.png").width > grid.width, "one strength more"


def test_another_models_adapter_is_refused_before_weights_are_read(
    t2v: Path, base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("weights"))
    other = build_tiny(tmp_path / "wider", layers=4, heads=3)
    lora = adapter(other, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"80 of 80 keys do not fit the model: transformer\.blocks\.0\.attn1"):
        sample(t2v, "--lora", lora)
    expert = adapter(t2v, tmp_path / "expert.safetensors", metadata={"tuner.expert": "low_noise"})
    with pytest.raises(ConfigError, match="trained on the expert 'low_noise'"):
        sample(base("t2v-14b-2.2-high"), "--lora", expert, flavour="t2v-14b-2.2-high")
    for words, message in (
        (("--lora", "gone.safetensors"), "there is no such file"),
        (("--lora", tmp_path / "wider"), "the folder holds a whole network"),
        (("--strengths", "1"), "does nothing without --lora"),
        (("--lora", lora, "--strengths", "much"), "is no list of numbers"),
        (("--seeds", "-1"), "is no list of numbers"),
        (("--validation_prompt", "a cat"), "--validation_prompt is said twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            sample(t2v, *words)
    with pytest.raises(ConfigError, match="there is nothing to render"):
        sample(t2v, prompt=False)
    assert not Path("output").exists()


def test_the_adapter_of_a_checkpoint_or_of_ema_in_it(t2v: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-10"
    lora = adapter(t2v, checkpoint / "pytorch_lora_weights.safetensors")
    adapter(t2v, checkpoint / "ema" / "pytorch_lora_weights.safetensors", seed=1)
    save({"step": torch.zeros(1)}, {}, checkpoint / "optimizer.safetensors")
    sample(t2v, "--lora", checkpoint, "--seeds", "1", "--output", "trained")
    sample(t2v, "--lora", checkpoint / "ema", "--seeds", "1", "--output", "averaged")
    record, averaged = (json.loads(next(Path(each).glob("*.json")).read_text()) for each in ("trained", "averaged"))
    assert record["adapters"][0]["sha256"] == sha256_of(lora) != averaged["adapters"][0]["sha256"]


def test_a_second_run_renders_what_is_missing_and_overwrites_nothing(t2v: Path, tmp_path: Path) -> None:
    sample(t2v, "--output", "out", "--seeds", "1,2")
    written = {path: path.read_bytes() for path in Path("out").glob("*.*")}
    assert "2 of them are there already\nwrote 0 clips" in sample(t2v, "--output", "out", "--seeds", "1,2")
    for path in Path("out").glob("*seed-2.*"):
        path.unlink()
    told = sample(t2v, "--output", "out", "--seeds", "1,2")
    assert "clips: 2, 1 of them are there already" in told
    assert {path: path.read_bytes() for path in written} == written
    other = build_tiny(tmp_path / "other" / t2v.name, layers=4, seed=1)
    with pytest.raises(ConfigError, match=r"it was rendered otherwise \(sampled_sha256 \w+, now \w+\)"):
        sample(other, "--output", "out", "--seeds", "1")
    with pytest.raises(ConfigError, match=r"is there already, and it was rendered otherwise \(steps 3, now 4\)"):
        sample(t2v, "--output", "out", "--seeds", "1", "--validation_num_inference_steps", "4")
    Path("out/a_red_circle_seed-5.mp4").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="there is no record beside it"):
        sample(t2v, "--output", "out", "--seeds", "5")
    assert Path("out/a_red_circle_seed-5.mp4").read_bytes() == b"mine"


def test_an_interrupted_run_keeps_whole_clips_and_goes_on(t2v: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, sampled = [], WanModel.sample

    def interrupted(self: WanModel, request: Any) -> Any:
        asked.append(request)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return sampled(self, request)

    monkeypatch.setattr(WanModel, "sample", interrupted)
    with pytest.raises(Stopped, match="SIGINT: 1 of 3 clips are rendered"):
        sample(t2v, "--output", "out", "--seeds", "1,2,3")
    assert [path.stem for path in Path("out").glob("*.mp4")] == ["a_red_circle_seed-1"]
    assert "wrote 2 clips" in sample(t2v, "--output", "out", "--seeds", "1,2,3")
    assert len(asked) == 4
