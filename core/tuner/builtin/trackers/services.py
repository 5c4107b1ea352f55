"""Trackers as Accelerate has them, each with what it needs to be opened, continued and shown pictures.

Everything here is called in the tracker's own thread (``outbox``), also the imports of its library.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.builtin.file_kinds import is_picture
from tuner.builtin.trackers.media import first_frames, gif_of


@dataclass(frozen=True)
class Opening:
    """What a tracker is opened with."""

    project: str
    run_name: str
    output_dir: Path
    step: int
    """Steps that are done."""
    run_id: str
    """Of the tracker's run."""
    resumed: bool
    """Whether the tracker has that run already."""
    online: bool
    config: Mapping[str, Any]
    """Of the run, flat, without secrets."""


class Service:
    """A tracker class that was registered with Accelerate (``accelerate.tracking.register_tracker_class``)."""

    accelerate_name = ""
    config_is_fixed = False
    """Whether the tracker refuses a second config, when a run goes on."""
    gives_id = False
    """Whether the tracker gives its runs their ids; to the others we say which."""

    def __init__(self, name: str, opening: Opening) -> None:
        self.accelerate_name = self.accelerate_name or name
        self.opening = opening
        self._tracker: Any = None

    def open(self) -> str:
        """Begin the tracker's run, or go on with it; returns its id."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        made = LOGGER_TYPE_TO_CLASS[self.accelerate_name]
        folder = [str(self.opening.output_dir / self.accelerate_name)] if made.requires_logging_directory else []
        self._tracker = made(*self.arguments(), *folder, **self.options())
        self._tracker.start()
        if not (self.opening.resumed and self.config_is_fixed):
            self._tracker.store_init_configuration(dict(self.opening.config))
        return self.opened_id()

    def arguments(self) -> Sequence[str]:
        """What its class is called with first."""
        return [self.opening.project]

    def options(self) -> dict[str, Any]:
        """What else its class is called with."""
        return {}

    def opened_id(self) -> str:
        """The id of the run that was opened."""
        return self.opening.run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The numbers of a line."""
        self._tracker.log(dict(values), step=step)

    def show(self, name: str, path: Path, step: int) -> None:
        """A picture or a video of a validation."""
        if hasattr(self._tracker, "log_images"):
            self._tracker.log_images({name: first_frames(path)}, step=step)

    def close(self) -> None:
        """End the tracker's run."""
        self._tracker.finish()


class TensorBoard(Service):
    """Event files in ``output_dir/tensorboard``; videos are GIFs, which TensorBoard plays."""

    accelerate_name = "tensorboard"
    config_is_fixed = True

    def arguments(self) -> Sequence[str]:
        """The folder below ``output_dir/tensorboard``."""
        return [self.opening.run_name]

    def options(self) -> dict[str, Any]:
        """Lines that an earlier try wrote beyond the step where this one begins are no longer shown."""
        return {"purge_step": self.opening.step + 1}

    def show(self, name: str, path: Path, step: int) -> None:
        """A picture, or a GIF: ``add_video`` of the writer needs moviepy."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        data, width, height = gif_of(path)
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=data)
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._tracker.tracker._get_file_writer().add_summary(summary, step)


class Wandb(Service):
    """Weights & Biases; offline where nobody is logged in."""

    accelerate_name = "wandb"

    def options(self) -> dict[str, Any]:
        """``WANDB_MODE`` and ``WANDB_CONSOLE`` of the environment stand above ours."""
        made: dict[str, Any] = {
            "name": self.opening.run_name,
            "id": self.opening.run_id,
            "resume": "allow",
            "dir": str(self.opening.output_dir),
        }
        if not os.environ.get("WANDB_MODE"):
            made["mode"] = "online" if self.opening.online else "offline"
        if not os.environ.get("WANDB_CONSOLE"):
            made["settings"] = {"console": "off"}  # it would take the progress bar for output
        return made

    def show(self, name: str, path: Path, step: int) -> None:
        """A picture or a video, as its file."""
        import wandb

        shown = wandb.Image(str(path)) if is_picture(path) else wandb.Video(str(path), format=path.suffix[1:])
        self._tracker.log({name: shown}, step=step)


class Trackio(Service):
    """Trackio: on this machine, unless its environment variables name a Space. A run goes on by its name."""

    accelerate_name = "trackio"

    def options(self) -> dict[str, Any]:
        """No dashboard is started."""
        return {
            "name": self.opening.run_name,
            "resume": "allow" if self.opening.resumed else "never",
            "embed": False,
            "auto_log_gpu": False,
            "auto_log_cpu": False,
        }

    def show(self, name: str, path: Path, step: int) -> None:
        """A picture or a video, as its file."""
        import trackio

        shown = trackio.Image(str(path)) if is_picture(path) else trackio.Video(str(path), format=path.suffix[1:])
        self._tracker.log({name: shown}, step=step)


class MLflow(Service):
    """MLflow, where ``MLFLOW_TRACKING_URI`` says. Files of validations are the run's artifacts."""

    accelerate_name = "mlflow"
    config_is_fixed = True
    gives_id = True

    def options(self) -> dict[str, Any]:
        """Only a run that is there already has an id."""
        known = {"run_id": self.opening.run_id} if self.opening.resumed else {}
        return {"run_name": self.opening.run_name, **known}

    def opened_id(self) -> str:
        """The id that MLflow gave."""
        return str(self._tracker.tracker.info.run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Its names have no ``@``."""
        super().log({name.replace("@", "."): value for name, value in values.items()}, step)

    def show(self, name: str, path: Path, step: int) -> None:
        """The file, in a folder of its step."""
        self._tracker.log_artifact(str(path), artifact_path=f"validation/step-{step}")


class Comet(Service):
    """Comet; offline where nobody is logged in."""

    accelerate_name = "comet_ml"

    def options(self) -> dict[str, Any]:
        """Nothing but what we log."""
        import comet_ml

        offline = str(self.opening.output_dir / "comet")
        settings = comet_ml.ExperimentConfig(
            name=self.opening.run_name,
            offline_directory=offline,
            log_code=False,
            log_graph=False,
            parse_args=False,
            auto_param_logging=False,
            auto_metric_logging=False,
            auto_output_logging=False,
            display_summary_level=0,
        )
        online = {} if os.environ.get("COMET_START_ONLINE") else {"online": self.opening.online}
        mode = {"mode": "get_or_create"} if self.opening.online else {}
        return {"experiment_key": self.opening.run_id, "experiment_config": settings, **online, **mode}

    def show(self, name: str, path: Path, step: int) -> None:
        """A picture or a video, as its file."""
        log = self._tracker.tracker.log_image if is_picture(path) else self._tracker.tracker.log_video
        log(str(path), name=name, step=step)


class SwanLab(Service):
    """SwanLab; offline where nobody is logged in. Its videos are GIFs."""

    accelerate_name = "swanlab"

    def options(self) -> dict[str, Any]:
        """``SWANLAB_MODE`` of the environment stands above ours."""
        made: dict[str, Any] = {
            "name": self.opening.run_name,
            "id": self.opening.run_id,
            "resume": "allow",
            "log_dir": str(self.opening.output_dir / "swanlab"),
        }
        if not os.environ.get("SWANLAB_MODE"):
            made["mode"] = "online" if self.opening.online else "offline"
        return made

    def show(self, name: str, path: Path, step: int) -> None:
        """A picture, or a GIF."""
        import swanlab

        shown = swanlab.Image(first_frames(path)[0]) if is_picture(path) else swanlab.Video(gif_of(path)[0])
        self._tracker.log({name: shown}, step=step)


SERVICES: dict[str, type[Service]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": MLflow,
    "comet": Comet,
    "swanlab": SwanLab,
}
