"""Toy runs that report to somebody."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner import pipeline
from tuner.assembly import assemble
from tuner.testing.clips import render_clip
from tuner.testing.plugin_env import importable, toy_distribution, write_distribution
from tuner.testing.project import flat_config, video_entry
from tuner.testing.toy import build_toy

FAKES = '''
"""Trackers of a test, registered with Accelerate as anyone's plugin would."""
import threading

from accelerate.tracking import GeneralTracker, register_tracker_class

from tuner import Plugin, PluginConfig, hookimpl, key

CALLS = []
RELEASE = threading.Event()


class Fake(GeneralTracker):
    name = "fake"
    requires_logging_directory = False

    def __init__(self, project, **options):
        super().__init__()
        CALLS.append(("made", threading.current_thread() is threading.main_thread(), project))

    @property
    def tracker(self):
        return self

    def start(self):
        CALLS.append(("start",))

    def store_init_configuration(self, values):
        CALLS.append(("config", values))

    def log(self, values, step=None, **kwargs):
        CALLS.append(("log", step, values))

    def log_images(self, values, step=None, **kwargs):
        CALLS.append(("images", step, {name: [image.size for image in images] for name, images in values.items()}))

    def finish(self):
        CALLS.append(("finish",))


class Hanging(Fake):
    name = "hanging"

    def log(self, values, step=None, **kwargs):
        RELEASE.wait(60)


class Raising(Fake):
    name = "raising"

    def log(self, values, step=None, **kwargs):
        raise ConnectionError("no route to host")


class FakesConfig(PluginConfig):
    fakes_hub_token: str = key("", "A secret.")


class FakesPlugin(Plugin[FakesConfig]):
    """Registers trackers."""

    Config = FakesConfig

    @hookimpl
    def configure(self, run):
        for made in (Fake, Hanging, Raising):
            register_tracker_class(made)
'''


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a toy model and clips; the plugins ``toy`` and ``fakes`` can be found."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tracked")
    build_toy(folder / "model")
    for index in range(2):
        render_clip(folder / "clips" / f"clip {index}.mp4", width=96, height=64, frames=9, fps=16, seed=index)
    site = toy_distribution(folder / "site")
    modules = {"tuner_test_fakes": FAKES}
    write_distribution(site, "tuner-fakes", {"fakes": "tuner_test_fakes:FakesPlugin"}, modules=modules)
    with importable(site):
        yield folder


@pytest.fixture
def fakes(workplace: Path) -> Iterator[Any]:
    """The module of the test's trackers, with no calls yet."""
    import tuner_test_fakes  # type: ignore[import-not-found]
    from accelerate import tracking

    before = dict(tracking.LOGGER_TYPE_TO_CLASS)
    tuner_test_fakes.CALLS.clear()
    tuner_test_fakes.RELEASE.clear()
    yield tuner_test_fakes
    tuner_test_fakes.RELEASE.set()
    tracking.LOGGER_TYPE_TO_CLASS.clear()
    tracking.LOGGER_TYPE_TO_CLASS.update(before)
    sys.modules.pop("tuner_test_fakes", None)


Run = Callable[..., Path]


@pytest.fixture
def run(workplace: Path) -> Run:
    """Runs a config over the toy model and returns its output folder."""

    def go(output: Path, **keys: Any) -> Path:
        video = video_entry(workplace / "clips", resolution_type="pixel_area")
        usual = {"output_dir": str(output), "train_batch_size": 2, "learning_rate": 1e-2}
        settings = flat_config(workplace, video, **(usual | keys))
        pipeline.run(assemble(settings))
        return output

    return go
