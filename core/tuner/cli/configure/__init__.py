"""``tuner configure``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli import options
from tuner.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tuner.cli.configure.draft import Draft, Drafting
    from tuner.cli.configure.files import Existing
    from tuner.cli.configure.propose import Answers
    from tuner.selection import Catalog
    from tuner.spec import ModelSpec


def _flag(name: str, words: str) -> Any:
    return typer.Option(name, help=words, show_default=False)


Output = Annotated[Path, typer.Option("--output", help="Folder of the files; what is there is edited.")]
Teach = Annotated[str | None, _flag("--teach", "What to teach: character, style, motion or other.")]
Trigger = Annotated[str | None, _flag("--trigger", "A word that stands for it in prompts.")]
Clips = Annotated[str | None, _flag("--clips", "Folder of clips or pictures.")]
Caption = Annotated[str | None, _flag("--caption", "One caption for all, instead of .txt files beside the clips.")]
Model = Annotated[str | None, _flag("--model", "Flavour of the model, such as t2v-480p-1.3b-2.1.")]
Base = Annotated[str | None, _flag("--base", "Folder or hub repository of its weights; the model's own when absent.")]
Card = Annotated[str | None, _flag("--card", "Card such as 'RTX 4090', a size such as 24G, or none; this machine's.")]
Frames = Annotated[str | None, _flag("--frames", "The most frames of a training clip; 81 when absent.")]
Prompts = Annotated[list[str] | None, _flag("--prompt", "What validation renders; several may be given.")]
Yes = Annotated[bool, typer.Option("--yes", help="Ask nothing: take the flags, and proposals for the rest.")]


def configure(
    context: typer.Context,
    output: Output = Path("config"),
    teach: Teach = None,
    trigger: Trigger = None,
    clips: Clips = None,
    caption: Caption = None,
    model: Model = None,
    base: Base = None,
    card: Card = None,
    frames: Frames = None,
    prompt: Prompts = None,
    yes: Yes = False,
    debug: options.Debug = False,
) -> None:
    """Ask what to teach a model, look at clips and card, and write the config."""
    import sys

    if not yes and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            "tuner configure asks questions, and there is no terminal here",
            remedy="answer by flags: tuner configure --yes --clips FOLDER --teach character",
        )
    given = {
        "teach": teach,
        "trigger": trigger,
        "clips": clips,
        "caption": caption,
        "model": model,
        "base": base,
        "card": card,
        "frames": frames,
    }
    _run(output, {name: text for name, text in given.items() if text is not None}, prompt or [], context.args, yes)


def _run(output: Path, given: Mapping[str, str], prompts: list[str], arguments: list[str], yes: bool) -> None:
    from tuner.cli.configure import questions
    from tuner.cli.configure.draft import Drafting
    from tuner.cli.configure.files import Existing
    from tuner.cli.flags import parse_flags
    from tuner.config.owners import KeyIndex, canonical
    from tuner.selection import Catalog, Wanted

    catalog = Catalog()
    index = KeyIndex(catalog, Wanted.read({}).certain(catalog))
    flags = canonical(parse_flags(arguments, "command line"), index)
    fixed = {key: questions.value_of(key, text, index) for key, text in flags.items()}
    existing = Existing.read(output, index)
    known = questions.models(catalog)
    answers = existing.answers | {name: questions.parsed(name, text) for name, text in given.items()}
    answers |= {"prompts": tuple(prompts)} if prompts else {}
    answers = _completed(answers, fixed, known, catalog)
    drafting = Drafting(existing, output, catalog, show_progress=not yes)
    if yes:
        draft = _without_questions(drafting, answers, fixed)
    else:
        from tuner.cli.configure.dialog import Dialog

        draft = Dialog(drafting, index, known, fixed, frozenset(given)).hold(answers, _answers)
    _finish(existing, draft, output)


def _completed(
    answers: Mapping[str, Any], fixed: Mapping[str, Any], known: Mapping[str, ModelSpec], catalog: Catalog
) -> dict[str, Any]:
    """With what this machine and the installed families say where nobody else does."""
    from tuner.cli.configure import memory, questions
    from tuner.cli.configure.draft import described

    family = fixed.get("model_family") or answers.get("family")
    model = fixed.get("model_flavour") or answers.get("model")
    base = fixed.get("pretrained_model_name_or_path") or answers.get("base", "")
    if model:
        family = questions.family_of(model, known)
    families = sorted({spec.family for spec in known.values()})
    if family is None and len(families) == 1:
        family = families[0]
    if not model and family is not None:
        settings = {"model_family": family} | ({"pretrained_model_name_or_path": base} if base else {})
        model = described(settings, catalog).flavour
    card = answers.get("card") or memory.detected()
    return {"teach": "other", **answers, "family": family or "", "model": model or "", "base": base, "card": card}


def _answers(words: Mapping[str, Any]) -> Answers:
    from tuner.cli.configure.propose import Answers

    return Answers(**{**words, "clips": Path(words["clips"]), "prompts": tuple(words.get("prompts", ()))})


def _without_questions(drafting: Drafting, answers: Mapping[str, Any], fixed: Mapping[str, Any]) -> Draft:
    """Raises ConfigError where an answer is missing, or where nothing fits the card."""
    for name, example in (("clips", "datasets/my-clips"), ("model", "t2v-480p-1.3b-2.1")):
        if not answers.get(name):
            raise ConfigError(f"nobody says --{name}", where="--yes", remedy=f"add --{name} {example}")
    from tuner.cli.configure.look import lines

    made = _answers(answers)
    for line in lines(drafting.look(made.clips)):
        print(f"  {line}")
    draft = drafting.plan(drafting.draft(made, fixed))
    if draft.planned is not None and draft.planned.problem is not None:
        raise draft.planned.problem
    from tuner.cli.configure.pages import summary

    print("\n".join(summary(draft)))
    return draft


def _finish(existing: Existing, draft: Draft, output: Path) -> None:
    from tuner.cli.configure.files import CONFIG
    from tuner.config.load import DEFAULT_PATH

    print("\n".join(existing.write(draft)))
    path = output / CONFIG
    named = "" if path == DEFAULT_PATH else f" --config {path}"
    print(f"next: tuner check{named}, then tuner run{named}")
