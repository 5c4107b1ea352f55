"""``tuner plan`` as a user sees it, and what a run says of its speed."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuner import cli, pipeline
from tuner.assembly import assemble
from tuner.testing.clips import render_clip
from tuner.testing.opened import opened
from tuner_wan.tiny import build_tiny

HALF = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}
SIZES = [(32, 32, 5), (32, 32, 5), (32, 32, 5), (64, 64, 9)]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("planned")
    build_tiny(home / "model", layers=4)
    for index, (width, height, frames) in enumerate(SIZES):
        name = home / str(width) / f"clip {index}.mp4"
        render_clip(name, width=width, height=height, frames=frames, fps=16, seed=index)
    return home


def settings(folder: Path, **keys: Any) -> dict[str, Any]:
    """A config over the tiny model and clips of two shapes."""
    videos = [
        {
            "id": f"clips-{size}",
            "dataset_type": "video",
            "instance_data_dir": str(folder / str(size)),
            "caption_strategy": "filename",
            "resolution": size,
            "resolution_type": "pixel",
            "video": {"num_frames": frames},
        }
        for size, frames in ((32, 5), (64, 9))
    ]
    return {
        "model_family": "wan",
        "pretrained_model_name_or_path": str(folder / "model"),
        "output_dir": str(folder / "output"),
        "cache_dir": str(folder / "cache"),
        "max_train_steps": 8,
        "lora_rank": 2,
        "mixed_precision": "no",
        "gradient_checkpointing": True,
        "data_backend_config": [*videos, {"id": "text", "dataset_type": "text_embeds", "default": True}],
        **keys,
    }


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs ``tuner plan`` over a config in this process: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def go(config: dict[str, Any], *words: str) -> tuple[int, str, str]:
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["tuner", "plan", "--config", "config.json", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return go


LARGE = {"model_family": "wan", "model_flavour": "t2v-480p-14b-2.1", "max_train_steps": 10}


def test_shapes_of_a_real_model_need_neither_data_nor_weights_nor_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LARGE), encoding="utf-8")
    words = ["tuner", "plan", "--config", "config.json", "--shape", "832x480x81,832x480", "--card", "h100", "--json"]
    code = (
        f"import sys\nfrom tuner import cli\nsys.argv = {words!r}\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'diffusers', 'transformers', 'numpy', 'av')\n"
        "print('imported:', *[name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr.strip().splitlines()[-1] == "imported:"
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    found = json.loads(done.stdout)
    clip, picture = found["networks"]["transformer"]["shapes"]
    assert (clip["tokens"], picture["tokens"]) == (32760, 1560)
    assert round(clip["flops"] / 1e12) == 6383  # see test_plan_flops.py
    assert clip["seconds"] == pytest.approx(13.4, rel=0.01)
    assert found["card"] == "H100"
    assert found["hours"] is None
    assert clip["memory"]["device"]["base weights"] == pytest.approx(14.288e9 * 2, rel=1e-3)
    assert clip["memory"]["device"]["kept for backward"] == pytest.approx(40 * 32760 * 5120 * 2, rel=0.1)
    assert sum(clip["memory"]["device"].values()) > sum(picture["memory"]["device"].values()) > 14.288e9 * 2
    assert not clip["memory"]["host"]


def test_data_are_surveyed_and_each_shape_weighs_as_often_as_it_comes(folder: Path, call: Call) -> None:
    code, out, err = call(settings(folder, plan_card="RTX 4090"), "--json")
    assert code == 0, err
    assert not list((folder / "cache").rglob("*.safetensors"))
    found = json.loads(out)
    network = found["networks"]["transformer"]
    small, large = network["shapes"]
    assert [(each["width"], each["frames"], each["tokens"]) for each in (small, large)] == [(32, 5, 8), (64, 9, 48)]
    assert [each["share"] for each in (small, large)] == [0.75, 0.25]
    assert network["mean"]["flops"] == pytest.approx(0.75 * small["flops"] + 0.25 * large["flops"])
    assert (found["card"], found["steps"]) == ("RTX 4090", 8)
    assert found["hours"] == pytest.approx(8 * network["mean"]["seconds"] / 3600)


def test_the_table_names_shapes_times_and_what_routes_bring(call: Call) -> None:
    routed = {**LARGE, "tread_config": HALF}
    code, out, _ = call(routed, "--shape", "832x480x81,832x480", "--card", "H100")
    assert code == 0
    (clip,) = re.findall(r"^832x480, 81 frames .*$", out, re.MULTILINE)
    assert clip.split()[3:] == ["50%", "1", "32760", "2413", "37%", "5.33", "2.52", "x"]
    assert re.search(r"On average .* times as fast by routes", out)
    assert "not measured" in call(routed, "--shape", "832x480", "--card", "RTX 3090")[1]
    plain = call(LARGE, "--shape", "832x480")[1]
    assert "routes" not in plain
    assert "For times name a card" in plain


def test_memory_is_shown_for_the_shape_that_takes_most(call: Call) -> None:
    words = ("--shape", "832x480,832x480x81", "--enable_group_offload")
    code, out, err = call(LARGE, *words)
    assert code == 0, err
    (table,) = re.findall(r"^GiB at most, training on clips of 832x480, 81 frames +device +host *$", out, re.MULTILINE)
    below = out.partition(table)[2].partition("GiB at most")[0]
    (weights,) = re.findall(r"^base weights +([\d.]+) +([\d.]+) *$", below, re.MULTILINE)
    device, host = map(float, weights)
    assert device < 3 < 25 < host
    (total,) = re.findall(r"^in all +([\d.]+)", below, re.MULTILINE)
    shown = re.findall(r"^[a-zA-Z ]+?  +([\d.]+)", below.partition("in all")[0], re.MULTILINE)
    assert float(total) == pytest.approx(sum(map(float, shown)), abs=0.05)


def test_every_phase_is_shown_by_component_and_the_worst_is_named(call: Call) -> None:
    rendering = {**LARGE, "validation_prompt": "a fox", "enable_group_offload": True, "vae_enable_tiling": True}
    words = ("--shape", "832x480x81", "--card", "L4")
    code, out, err = call(rendering, *words)
    assert code == 0, err
    for phase in ("caching (text encoder)", "caching (vae)", "validation (rendering)", "validation (vae)"):
        assert re.search(rf"^GiB at most, {re.escape(phase)} +device +host *$", out, re.MULTILINE)
    assert re.search(r"^weights of text encoder +10\.58", out, re.MULTILINE)
    assert re.search(r"L4 has 22 GiB\. For what would fit: tuner plan --fit 22G", " ".join(out.split()))
    found = json.loads(call(rendering, *words, "--json")[1])
    by_phase = {(each["name"], each["what"]): each for each in found["phases"]}
    training = found["networks"]["transformer"]["shapes"][0]["memory"]["device"]
    assert by_phase["training", ""]["device"] == training
    assert found["peak"]["device"] == {"phase": "training", "bytes": sum(training.values())}
    assert by_phase["validation", "vae"]["device"]["vae at work"] < 1.8e9, "tile by tile, 81 frames of 832x480"
    whole = json.loads(call({**rendering, "vae_enable_tiling": False}, *words, "--json")[1])["phases"]
    assert whole[-1]["device"]["vae at work"] > 7e9
    assert len(json.loads(call(LARGE, *words, "--json")[1])["phases"]) == 3, "without a prompt nothing is rendered"


def test_validation_is_planned_at_its_own_size(call: Call) -> None:
    asked = {"validation_prompt": "a fox", "validation_resolution": "1280x720", "validation_num_video_frames": 33}
    decoding = [
        json.loads(call({**LARGE, **keys}, "--shape", "832x480x81", "--json")[1])["phases"][-1]["device"]["vae at work"]
        for keys in (asked, {"validation_prompt": "a fox"})
    ]
    pixels = (1280 * 720, 832 * 480)
    assert decoding == pytest.approx([pixels[0] * (19500 + 12.5 * 33), pixels[1] * (19500 + 12.5 * 81)])


def test_a_quantised_text_encoder_is_planned(call: Call) -> None:
    words = ("--shape", "832x480", "--json", "--text_encoder_1_precision", "fp8-scaled")
    (caching, *_) = json.loads(call(LARGE, *words)[1])["phases"]
    assert caching["what"] == "text encoder"
    assert caching["device"]["weights of text encoder"] == 5_680_910_336 + 256384 * 4096


def test_both_experts_are_planned(call: Call) -> None:
    experts = {**LARGE, "model_flavour": "t2v-14b-2.2-both"}
    _, out, _ = call(experts, "--shape", "832x480x81")
    assert "high_noise: one optimizer step" in out
    assert "low_noise: one optimizer step" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shape", "832x480x80"), ["takes no clips of 832x480x80", "did you mean '832x480x77'?"]),
        (("--shape", "830x480x81"), ["multiples of 16", "did you mean '816x480x81'?"]),
        (("--shape", "0x480x81"), ["takes no clips of 0x480x81"]),
        (("--shape", "81 frames"), ["'81 frames' is no shape"]),
        (
            ("--shape", "832x480", "--card", "H10"),
            ["no rates are known for a card 'H10'", "did you mean 'H100'?", "--card"],
        ),
        (("--shape", "832x480", "--plan_card", "H10"), ["no rates are known for a card 'H10'", "plan_card"]),
        ((), ["there are no data to plan for", "tuner plan --shape 832x480x81"]),
    ],
)
def test_what_cannot_be_planned_is_said_in_the_users_words(words: tuple[str, ...], said: list[str], call: Call) -> None:
    code, _, err = call(LARGE, *words)
    assert code == 2
    for part in said:
        assert part in err
    assert "Traceback" not in err


def test_a_left_out_planner_leaves_the_command_and_its_card(call: Call) -> None:
    code, out, _ = call(LARGE, "--shape", "832x480", "--without", "planner", "--card", "H100")
    assert code == 0
    assert "on H100" in out


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], list[str]]:
    """Runs a config; what was logged."""
    monkeypatch.setattr(logging.getLogger("tuner"), "propagate", True)
    caplog.set_level(logging.INFO, "tuner")

    def go(config: dict[str, Any]) -> list[str]:
        pipeline.run(assemble(config))
        return [record.message for record in caplog.records]

    return go


def test_a_run_says_what_a_step_takes_before_and_after(
    folder: Path, lines: Callable[[dict[str, Any]], list[str]]
) -> None:
    keys = {"max_train_steps": 24, "tread_config": HALF, "tread_ratio_schedule": "linear", "tread_warmup_steps": 24}
    said = lines(settings(folder, output_dir=str(folder / "measured"), plan_card="H100", **keys))
    (expected,) = [line for line in said if line.startswith("a step computes")]
    assert re.fullmatch(
        r"a step computes [\d.e-]+ TFLOP on clips of 2 shapes with 8 to 48 tokens, on average; "
        r"expected on H100: [\d.e-]+ s at least; its token routes make it 1\.\d+ times as fast",
        expected,
    )
    (measured,) = [line for line in said if line.startswith("measured over 20 steps")]
    assert re.search(
        r"[\d.]+ s a step \(expected on H100: [\d.e-]+ s at least\), [\d.e-]+ TFLOP/s, MFU 0% of 798", measured
    )


def test_routed_steps_are_held_against_unrouted_ones_where_there_were_both(
    folder: Path, lines: Callable[[dict[str, Any]], list[str]]
) -> None:
    """Half of a cosine: 16ths of the ratio, of which a clip of eight tokens drops none below an eighth."""
    keys = {"max_train_steps": 23, "tread_config": HALF, "tread_ratio_schedule": "cosine"}
    config = settings(folder, output_dir=str(folder / "compared"), **keys)
    said = lines(
        {**config, "data_backend_config": [config["data_backend_config"][0], config["data_backend_config"][-1]]}
    )
    (compared,) = [line for line in said if "steps with token routes were" in line]
    match = re.fullmatch(r"(\d+) steps with token routes were [\d.]+ times as fast as (\d+) without .*", compared)
    assert match is not None
    assert int(match[1]) + int(match[2]) == 20
    assert not any("MFU" in line for line in said)


def test_the_estimate_counts_the_adapter_that_is_trained(folder: Path) -> None:
    some = ["to_q", "attn2.to_k", "blocks.1.ffn.net.2"]
    for targets in (None, some):
        with opened(settings(folder, lora_target_modules=targets)) as session:
            run, network = session.run, session.model.network
            assert run.estimate is not None
            bucket = session.plan.micro_batches(0)[0].bucket
            workload = run.estimate(network.spec, bucket, 1)
            assert network.adapter is not None
            trained = {name: each for group in network.adapter.groups for name, each in group.parameters.items()}
            assert workload.adapter_parameters == sum(each.numel() for each in trained.values())
            on_text = [each for name, each in trained.items() if re.search(r"attn2\.to_[kv]", name)]
            assert workload.adapter_parameters_on_text == sum(each.numel() for each in on_text)
            block = sum(each.inputs * each.outputs for each in network.spec.matrices) + network.spec.small
            base = [each for name, each in network.module.named_parameters() if "lora" not in name]
            assert network.spec.blocks * block + network.spec.other == sum(each.numel() for each in base)
