"""``tuner sample``: clips of a base with adapters, rendered as validation renders them, without data and training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner import __version__, attention, pipeline, transforms
from tuner.assembly import new_run
from tuner.attention_switch import validation_backend
from tuner.builtin.sampling.adapters import Chosen, choose
from tuner.builtin.sampling.branches import Strength, attach
from tuner.builtin.sampling.cells import Cell, cells, is_whole
from tuner.builtin.sampling.clips import Clip, clips
from tuner.builtin.sampling.images import KEY, LAST, chosen_pictures, from_pictures, sample_id
from tuner.builtin.sampling.prompts import Prompt, placeholders
from tuner.builtin.sampling.provenance import model_record
from tuner.data.report import DataReport
from tuner.data.samples import Bucket, Decode, Prepared, Sample
from tuner.errors import ConfigError, ModelError, TrainingError
from tuner.model import Stage, Transform
from tuner.train import turns
from tuner.train.engine import Engine
from tuner.train.memory import is_out_of_memory
from tuner.validate.stage import untouched

if TYPE_CHECKING:
    from tuner.assembly import Assembly
    from tuner.data.cached import CachedData
    from tuner.model import Model, Network
    from tuner.run import Run
    from tuner.spec import ModelSpec

OF_TRAINING = (Stage.ADAPT, Stage.CHECKPOINT)
"""Edits of the model that rendering has no use for."""


@dataclass(frozen=True)
class Wishes:
    """What the command line asks for beside the config."""

    prompts: tuple[Prompt, ...]
    loras: tuple[str, ...]
    """``[NETWORK:]PATH[=SHARE]`` each"""
    strengths: tuple[float, ...]
    """of all of them; empty is 1"""
    seeds: tuple[int, ...]
    """empty is the config's"""
    folder: Path


@dataclass(frozen=True)
class Plan:
    """What is to be rendered, known before any weight is read."""

    run: Run
    spec: ModelSpec
    adapters: tuple[Chosen, ...]
    cells: tuple[Cell, ...]
    folder: Path
    model: Mapping[str, Any]
    """What records say of it."""
    starts: tuple[Sample, ...] = ()
    """The pictures that clips start from."""

    def record(self, cell: Cell) -> dict[str, Any]:
        """Everything that is needed to render ``cell`` again."""
        pictures = {
            name: {"file": path.name, "sha256": digest}
            for sample in self.starts
            if sample.sample_id == sample_id(cell.prompt)
            for name, path, digest in (
                ("first_frame", sample.path, sample.content_hash),
                *((each.role, each.path, each.content_hash) for each in sample.companions),
            )
        }
        return {
            "tuner": __version__,
            "model": self.model,
            "adapters": [each.record() for each in self.adapters],
            "strength": cell.strength,
            "prompt": cell.prompt.text,
            "nickname": cell.prompt.nickname,
            "settings": cell.settings.record(),
            **({"images": pictures} if pictures else {}),
        }


def plan(assembly: Assembly, wishes: Wishes, decode: Decode) -> tuple[Plan, list[str]]:
    """What ``wishes`` come to for the configured model, and lines for what is not quite as asked; no weight is read.

    Raises ConfigError, DataError or CheckpointError for what cannot be had.
    """
    run = new_run(assembly)
    spec = pipeline.describe(run, assembly.manager)
    every, _ = clips(run, spec, wishes.prompts)  # the plugin says what is not quite as asked
    notes = list(_assumed(run, every))
    missing = [network.name for network in spec.networks if not network.weights]
    if wishes.loras and missing:
        raise ModelError(
            f"the family {spec.family!r} does not say which weights {missing[0]} has, so no adapter can be held "
            "against it"
        )
    shapes = {network.name: network.weights for network in spec.networks}
    adapters = choose(wishes.loras, spec, shapes, assembly.manager.registry("adapter_formats", run))
    notes += [f"{each.path.name}: {note}" for each in adapters for note in each.file.notes]
    bare = [each.label or each.name for each in spec.networks if each.name not in {one.network for one in adapters}]
    if adapters and bare:
        notes.append(f"no adapter is for {', '.join(bare)}, which renders its steps as it comes")
    strengths: Sequence[float | None] = (wishes.strengths or (1.0,)) if adapters else (None,)
    wanted = cells(every, strengths, wishes.seeds)
    starts = _starting(run, spec, every, cache_root(run, wishes.folder), decode)
    model = model_record(run, spec)
    return Plan(run, spec, tuple(adapters), tuple(wanted), wishes.folder, model, tuple(starts)), notes


def _assumed(run: Run, every: Sequence[Clip]) -> Iterator[str]:
    """Lines for what nobody said, and for prompts that look unfinished."""
    if run.config.validation_resolution is None or run.config.validation_num_video_frames is None:
        sizes = dict.fromkeys(f"{each.settings.width}x{each.settings.height}" for each in every)
        frames = dict.fromkeys(str(each.settings.frames) for each in every)
        yield (
            f"rendered at {', '.join(sizes)} with {', '.join(frames)} frames: set validation_resolution and "
            "validation_num_video_frames for others"
        )
    if unfilled := placeholders(each.prompt for each in every if each.prompt.text != run.config.validation_prompt):
        yield f"prompts are rendered with {', '.join(unfilled)} as it stands: write the name you trained"


def outstanding(plan: Plan) -> list[Cell]:
    """The clips that are not there yet. Raises ConfigError where a file of another kind has the name of one."""
    return [cell for cell in plan.cells if not is_whole(plan.folder, cell, plan.record(cell))]


def _starting(run: Run, spec: ModelSpec, every: Sequence[Clip], root: Path, decode: Decode) -> Iterator[Sample]:
    """The user's pictures for each clip, of a model that starts from them."""
    clean = spec.condition == "clean_first_frame"
    moving = [clip for clip in every if clip.settings.frames > 1 or not clean]
    if not spec.frames_taken or not moving:
        return
    if run.config.validation_images is None:
        raise ConfigError(
            f"{spec.flavour} renders from {' and '.join(spec.frames_taken).replace('_', ' ')}, and there is none",
            where=KEY,
            remedy="name a picture, or a folder of pictures named like the prompts: --validation_images cat.png",
        )
    stores = (root / "vae" / KEY, root / "images" if spec.conditioning_frames else None)
    pictures = chosen_pictures(run.config, [clip.prompt for clip in moving], LAST in spec.frames_taken)
    for clip in moving:
        frames, height, width = clip.shape
        bucket = Bucket(1 if clean else frames, height, width)
        yield from_pictures(clip.prompt, pictures[clip.prompt], bucket, decode, stores)


def cache_root(run: Run, folder: Path) -> Path:
    """Where encoded prompts and pictures are kept for the next time."""
    config = run.config
    return config.cache_dir or (config.output_dir if "output_dir" in run.explicit else folder) / "cache"


@contextmanager
def opened(assembly: Assembly, plan: Plan, decode: Decode) -> Iterator[tuple[Model, Strength]]:
    """The model with its weights and adapters, everything encoded, in the state that validation renders in.

    Encoders are loaded, used and freed before the denoiser's weights are read.
    """
    run, manager = plan.run, assembly.manager
    engine = Engine(run)
    model: Model = manager.hook.load_model(run=run)
    edits = [each for each in transforms.declared(run, model, manager) if each.stage not in OF_TRAINING]
    strength = Strength()
    edits.append(Transform(Stage.ADAPT, "adapters", frozenset(), lambda network: _adapt(plan, network, strength)))
    _encode(assembly, plan, model, decode)
    for network in model.networks.values():
        transforms.prepare(run, network, sorted(edits, key=lambda each: each.stage))
        if len(model.networks) > 1:
            turns.leave(network)  # to the host, until the sampler comes to it
    backends = manager.registry("attention_backends", run)
    kernel = attention.choose(run.config.attention_mechanism, run.config.attention_usage, backends).inference
    with ExitStack() as stack:
        stack.enter_context(untouched(model, engine.device))
        stack.enter_context(engine.autocast())
        for network in model.networks.values():
            stack.enter_context(validation_backend(network, kernel))
        yield model, strength


def _adapt(plan: Plan, network: Network, strength: Strength) -> None:
    files = [(each.file, each.share) for each in plan.adapters if each.network == network.name]
    attach(network, files, strength, plan.run.device)


def _encode(assembly: Assembly, plan: Plan, model: Model, decode: Decode) -> None:
    """Encode the prompts and pictures that the cache lacks."""
    run, hook = plan.run, assembly.manager.hook
    root = cache_root(run, plan.folder)
    captions = list(dict.fromkeys(text for cell in plan.cells for text in (cell.prompt.text, cell.settings.negative)))
    data = Prepared((), {}, root / "text", DataReport(()), decode, extra=plan.starts)
    cached: CachedData = hook.fill_cache(run=run, model=model, data=data, captions=captions, hooks=hook, verify=False)
    run.text_cache, run.cached = cached.text, cached


@contextmanager
def memory_explained(assembly: Assembly, plan: Plan, model: Model) -> Iterator[None]:
    """Say what would save memory where the device has none left. Raises TrainingError."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        answers = assembly.manager.hook.memory_advice(run=plan.run, model=model)
        advice = [line for answer in answers for line in answer]
        frames, height, width = max(cell.clip.shape for cell in plan.cells)
        raise TrainingError(
            f"out of memory while rendering clips of up to {width}x{height} with {frames} frames: {error}",
            where=str(plan.run.device),
            allowed="; or ".join(advice) or None,
            remedy="clips that are written are kept: change the config and give the same command again",
        ) from error
