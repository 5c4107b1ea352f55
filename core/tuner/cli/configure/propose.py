"""Settings for what someone wants to teach, from what their clips and the model are; each with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.cli.configure.look import Look, edges
from tuner.errors import ConfigError

if TYPE_CHECKING:
    from tuner.builtin.datasets.probe_file import VideoFacts
    from tuner.spec import ModelSpec

TEACH = ("character", "style", "motion", "other")
LATENT_FRAMES = (1, 2, 4, 8, 12, 16, 20, 24, 30)
"""Lengths of clips that are proposed, in latent frames behind the first."""
LONGEST = 81
"""Frames, where nobody says otherwise: five seconds of Wan."""
EDGE = 480
"""Edge of the square of the area that is proposed where the files are large enough."""
FASTER, SLOWER = 1.1, 0.95
"""Of the model's frame rate: clips above the first are resampled, none below the second ever is."""
UNSEEN = {
    "character": "{it} walks along a beach at sunset, handheld camera",
    "style": "a small brown dog walks along a beach at sunset, {it}",
    "motion": "a small brown dog on a beach at sunset, {it}",
    "other": "{it}, on a beach at sunset",
}
"""A prompt that is in nobody's captions: whether what was learnt carries over."""


@dataclass(frozen=True)
class Kind:
    """How one kind of subject is usually begun with."""

    rank: int
    passes: int
    dropout: float
    shift: float
    about: str
    """why that shift"""


KINDS = {
    "character": Kind(32, 80, 0.05, 3.0, "moderate: layout and detail alike"),
    "style": Kind(16, 50, 0.1, 3.0, "moderate: layout and detail alike"),
    "motion": Kind(32, 60, 0.05, 5.0, "high: motion is decided while there is much noise"),
    "other": Kind(16, 60, 0.1, 3.0, "moderate: layout and detail alike"),
}


@dataclass(frozen=True)
class Answers:
    """What a person knows."""

    clips: Path
    teach: str = "other"
    trigger: str = ""
    caption: str = ""
    family: str = ""
    model: str = ""
    base: str = ""
    card: str = ""
    frames: int = LONGEST
    prompts: tuple[str, ...] = ()


@dataclass
class Proposal:
    """Keys and values, with the reason for each."""

    values: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, value: Any, why: str) -> None:
        """Propose one key."""
        self.values[key], self.why[key] = value, why


def model_keys(answers: Answers) -> Proposal:
    """Which model."""
    made = Proposal()
    made.put("model_family", answers.family, "the family's plugin")
    if answers.model:
        made.put("model_flavour", answers.model, "which of the family's models")
    if answers.base:
        made.put("pretrained_model_name_or_path", answers.base, "where its weights are")
    return made


def training_keys(answers: Answers, found: Look, spec: ModelSpec, output: Path, steps: int | None = None) -> Proposal:
    """Length, rank, rates, checkpoints and validation; ``steps`` is the length where someone says it."""
    made, kind, name = Proposal(), KINDS[answers.teach], name_of(found.folder)
    steps = steps or min(4000, max(500, round(len(found.files) * kind.passes, -2)))
    every = max(100, round(steps / 8, -2))
    made.put("model_type", "lora", "an adapter: small, and easy to share")
    made.put("lora_rank", kind.rank, f"room for what is learnt; a usual start for {_a(answers.teach)}")
    made.put("mixed_precision", "bf16", "what the model was trained in")
    made.put("data_backend_config", str(output / "multidatabackend.json"), "the clips")
    made.put("caption_dropout_probability", kind.dropout, "share of samples without caption: guidance needs some")
    made.put("output_dir", f"output/{name}", "checkpoints, clips, LoRA files and the report")
    made.put("seed", 42, "the same seed gives the same run")
    passes = f"{steps / max(1, len(found.files)):.0f} passes over {len(found.files)} files at batch 1"
    made.put("max_train_steps", steps, f"about {passes}; look at the validation clips and stop when it is there")
    made.put("optimizer", "adamw", "the usual one")
    made.put("learning_rate", 1e-4, "usual for LoRA; halve it when clips fall apart")
    made.put("lr_scheduler", "constant_with_warmup", "checkpoints stay comparable")
    made.put("lr_warmup_steps", min(100, steps // 10), "a gentle start")
    made.put("flow_schedule_shift", kind.shift, f"which noise levels are trained; {kind.about}")
    made.put("checkpoint_step_interval", every, "as often as validation, so that every clip has its checkpoint")
    made.put("checkpoints_total_limit", 8, "the newest are kept")
    made.put("resume_from_checkpoint", "latest", "a run that was cut off goes on")
    made.put("validation_step_interval", every, "clips are rendered this often, and at the end")
    made.put("user_prompt_library", str(output / "user_prompt_library.json"), "what is rendered")
    made.put("validation_guidance", spec.defaults.get("validation_guidance", 5.0), "what the model's makers use")
    return made


def datasets(answers: Answers, found: Look, spec: ModelSpec) -> list[Proposal]:
    """The entries of the list of datasets, one for clips and one for pictures, and where captions' encodings go.

    Raises ConfigError when files have no captions and nobody says what they show.
    """
    name, entries = name_of(found.folder), []
    for kind, files in (("video", found.clips), ("image", found.pictures)):
        if not files:
            continue
        entry = Proposal()
        own = name if kind == "video" or not found.clips else f"{name}-pictures"
        entry.put("id", own, "")
        entry.put("type", "local", "")
        entry.put("dataset_type", kind, "")
        entry.put("instance_data_dir", str(answers.clips), f"{len(files)} files")
        entry.put("cache_dir_vae", str(cache_of(found.folder) / kind), "encoded once, used in every run")
        _captions(entry, answers, found)
        edge, why = _resolution(files, spec)
        entry.put("resolution", edge, why)
        entry.put("resolution_type", "pixel_area", "the area of a square of that edge; each keeps its own aspect")
        entry.put("crop", False, "nothing is cut off but what the model's sizes ask for")
        entry.put("repeats", 0, "extra passes in every epoch")
        if kind == "video":
            frames, why = _frames(files, spec, answers.frames)
            entry.put("video", frames, why)
        entries.append(entry)
    text = Proposal()
    for key, value in (("id", "text-embeds"), ("type", "local"), ("dataset_type", "text_embeds"), ("default", True)):
        text.put(key, value, "")
    text.put("cache_dir", str(cache_of(found.folder) / "text"), "encoded captions")
    return [*entries, text]


def prompts(answers: Answers, found: Look) -> dict[str, str]:
    """Nickname -> validation prompt: those that were given, else two captions of the data and something unseen."""
    if answers.prompts:
        return {f"prompt_{number}": text for number, text in enumerate(answers.prompts, 1)}
    own = list(dict.fromkeys(each[0] for each in found.captions))
    chosen = [own[0], own[len(own) // 2]] if len(own) > 1 else own or [answers.caption]
    lead = "" if not answers.trigger or answers.trigger.casefold() in chosen[0].casefold() else f"{answers.trigger}, "
    named = {f"seen_{number}": lead + text for number, text in enumerate(dict.fromkeys(chosen), 1) if text}
    if it := answers.trigger or answers.caption:
        named["unseen"] = UNSEEN[answers.teach].format(it=it)
    return named


def name_of(folder: Path) -> str:
    """What a dataset in ``folder`` is called."""
    return folder.resolve().name or "clips"


def cache_of(folder: Path) -> Path:
    """Where the encodings of a dataset in ``folder`` are kept."""
    return Path("cache") / name_of(folder)


def _captions(entry: Proposal, answers: Answers, found: Look) -> None:
    if found.uncaptioned and not answers.caption:
        raise ConfigError(
            f"{len(found.uncaptioned)} of {len(found.files)} files have no caption: {', '.join(found.uncaptioned[:3])}",
            where=found.folder,
            remedy="write a .txt of the same name beside each, or give one caption for all of them (--caption)",
        )
    if answers.caption:
        entry.put("caption_strategy", "instanceprompt", "one caption for all")
        joined = answers.caption if answers.trigger in answers.caption else f"{answers.trigger}, {answers.caption}"
        entry.put("instance_prompt", joined, "")
        return
    entry.put("caption_strategy", "textfile", "clip.txt beside clip.mp4; each line is an alternative")
    if answers.trigger and (share := found.mentions(answers.trigger)) < 1:
        if share:
            entry.why["caption_strategy"] += f"; {answers.trigger!r} is in {share:.0%} of them: put it into the others"
        else:
            entry.put("caption_prepend", f"{answers.trigger},", "no caption mentions it")


def _resolution(files: Sequence[VideoFacts], spec: ModelSpec) -> tuple[int, str]:
    own = edges(files)
    low, multiple = own[len(own) // 4], spec.size_multiple
    edge = max(multiple, int(min(EDGE, low)) // multiple * multiple)
    if low < EDGE:
        return edge, f"your files are {own[0]:.0f} to {own[-1]:.0f} by this measure: hardly any is enlarged"
    return edge, "enough to learn from; more shows finer detail and costs much more time and memory"


def _frames(files: Sequence[VideoFacts], spec: ModelSpec, longest: int) -> tuple[dict[str, Any], str]:
    rates = [each.fps for each in files]
    resampled = min(rates) >= SLOWER * spec.fps and max(rates) > FASTER * spec.fps
    rate = {"fps": spec.fps} if resampled else {}
    why = f"taken at {spec.fps:g} frames per second, as the model renders; " if resampled else ""
    counts = [int(each.duration * spec.fps) if resampled else each.frames for each in files]
    stride = spec.latents.stride_time
    top = spec.latents.frames_allowed(longest)
    known = sorted({*(stride * each + 1 for each in LATENT_FRAMES if stride * each + 1 < top), top})
    filled = Counter(max((size for size in known if size <= count), default=0) for count in counts)
    short = filled.pop(0, 0)
    if not filled:
        raise ConfigError(
            f"every clip is shorter than {known[0]} frames", remedy="take longer clips, or their frames as pictures"
        )
    lengths = sorted(filled)
    why += ", ".join(f"{number} clips of {size} frames" for size, number in sorted(filled.items()))
    why += f"; {short} are too short" if short else ""
    taken: Mapping[str, Any] = {"frame_buckets": lengths} if len(lengths) > 1 else {"num_frames": lengths[0]}
    return {**taken, "min_frames": lengths[0], **rate}, why


def _a(teach: str) -> str:
    return "something else" if teach == "other" else f"a {teach}"
