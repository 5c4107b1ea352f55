"""``tuner sample``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli import options
from tuner.errors import ConfigError

if TYPE_CHECKING:
    from tuner.assembly import Assembly
    from tuner.builtin.sampling.prompts import Prompt

OF_RUNS = ("hub", "preview", "trackers")
"""Plugins that show others how a run goes: rendering is none."""

Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        help="An adapter: [NETWORK:]PATH[=SHARE], a file or a folder such as a checkpoint. Several add up.",
        show_default=False,
    ),
]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", help="What to render; several may be given.", show_default=False)
]
Library = Annotated[
    Path | None, typer.Option("--prompts", help="A file of nickname -> prompt, each rendered.", show_default=False)
]
Negative = Annotated[
    str | None, typer.Option("--negative_prompt", "--negative-prompt", help="For every clip.", show_default=False)
]
Strengths = Annotated[
    str | None,
    typer.Option("--strengths", help="Of the adapters, such as 0,0.5,1: a clip for each; 1 when absent."),
]
Seeds = Annotated[
    str | None, typer.Option("--seeds", help="Such as 1,2: a clip for each; validation_seed when absent.")
]
Output = Annotated[
    Path | None, typer.Option("--output", help="Folder of the clips; samples in output_dir when absent.")
]


def sample(
    context: typer.Context,
    config: options.Config = None,
    lora: Lora = None,
    prompt: Prompts = None,
    prompts: Library = None,
    negative_prompt: Negative = None,
    strengths: Strengths = None,
    seeds: Seeds = None,
    output: Output = None,
    plugins: options.Plugins = None,
    without: options.Without = None,
    strict: options.Strict = False,
    debug: options.Debug = False,
) -> None:
    """Render clips from LoRA files, or from the base alone: no data, no training."""
    from tuner import processes
    from tuner.cli.report import print_assembly

    processes.refuse_several("`tuner sample`")
    if strengths is not None and not lora:
        raise ConfigError("--strengths does nothing without --lora", where="command line")
    shares = _numbers("--strengths", strengths, float)
    drawn = _numbers("--seeds", seeds, int)
    given: dict[str, Any] = {}
    if negative_prompt is not None:
        given["validation_negative_prompt"] = negative_prompt
    if prompts is not None or prompt:
        given |= {"validation_prompt": prompt[0] if prompt else None, "user_prompt_library": prompts}
        given["validation_prompt_library"] = None
    assembly = _settled(_assembly(context, config, plugins, without, strict, given))
    print_assembly(assembly)
    from tuner.builtin.sampling.sample import Wishes

    folder = output or assembly.core.output_dir / "samples"
    wishes = Wishes(_prompts(assembly, prompt or []), tuple(lora or ()), shares, drawn, folder)
    _render(assembly, wishes)


def _assembly(
    context: typer.Context,
    config: Path | None,
    plugins: str | None,
    without: list[str] | None,
    strict: bool,
    given: Mapping[str, Any],
) -> Assembly:
    """The assembly of the config, if there is one, with the flags and what the command's own options say."""
    import os

    from tuner.assembly import assemble
    from tuner.cli.flags import read_settings
    from tuner.cli.logs import show_log
    from tuner.config.load import DEFAULT_PATH, raw_config
    from tuner.selection import FAMILY, Catalog

    show_log()
    catalog = Catalog()
    file = {} if config is None and not DEFAULT_PATH.is_file() else raw_config(config)
    listed = options.names(plugins)
    named = (*(listed or ()), *(options.names(file.get("plugins")) or ()))
    idle = [name for name in OF_RUNS if name in catalog.installed and name not in named]
    left_out = [*(options.names(without) or ()), *idle]
    settings = read_settings(
        config, context.args, os.environ, plugins=listed, without=left_out, catalog=catalog, file=file
    )
    said = [name for name in given if settings.sources.get(name) == "command line"]
    if twice := [name for name in said if given[name] is not None]:
        raise ConfigError(f"--{twice[0]} is said twice, once by another option", where="command line")
    settings.put({name: value for name, value in given.items() if value is not None}, "command line")
    for name in [name for name, value in given.items() if value is None and name not in said]:
        settings.pop(name, None)
    families = [name for name in catalog.installed if (cls := catalog.peek(name)) and FAMILY in cls.provides]
    if not file and listed is None and len(families) == 1:
        settings.setdefault("model_family", families[0])
    if settings.get("model_type") == "full":
        settings.put({"model_type": "lora"}, "`tuner sample`, which trains nothing")
    return assemble(settings, plugins=listed, without=left_out, strict=strict or None, catalog=catalog)


def _settled(assembly: Assembly) -> Assembly:
    """With what plugins propose. Raises what they raise, which may be that the data they look at are not there."""
    from tuner.assembly import settle
    from tuner.errors import TunerError

    try:
        return settle(assembly)
    except TunerError as error:
        error.add_note("a key such as memory_preset looks at the data: set it to none to render without them")
        raise


def _prompts(assembly: Assembly, texts: list[str]) -> tuple[Prompt, ...]:
    """The prompts typed and those of the library; the config's own where there are neither. Raises ConfigError."""
    from tuner.builtin.sampling.cells import typed_prompts
    from tuner.builtin.sampling.prompts import validation_prompts

    core, plugin = assembly.core, assembly.plugins.get("sampling")
    if texts:
        core = core.model_copy(update={"validation_prompt": None})
    listed = validation_prompts(core, builtin=plugin is not None and plugin.config.validation_prompt_library)
    found = (*typed_prompts(texts), *listed)
    if not found:
        raise ConfigError("there is nothing to render", where="command line", remedy='say what: --prompt "a red fox"')
    names = [each.slug.casefold() for each in found]
    twice = next((each for each in found if names.count(each.slug.casefold()) > 1), None)
    if twice is not None:
        raise ConfigError(f"two prompts would be written to {twice.slug!r}", remedy="rename one in the library")
    return found


def _render(assembly: Assembly, wishes: Any) -> None:
    from tuner.builtin.datasets.decode import decode_file
    from tuner.builtin.sampling.gallery import render, write_sheets
    from tuner.builtin.sampling.sample import memory_explained, opened, outstanding, plan
    from tuner.output import writable

    planned, notes = plan(assembly, wishes, decode_file)
    todo = outstanding(planned)
    for note in notes:
        print(f"note: {note}")
    for each in planned.adapters:
        print(f"adapter: {each.path} for {each.network}, {len(each.file.updates)} modules, share {each.share:g}")
    there = len(planned.cells) - len(todo)
    print(f"clips: {len(planned.cells)}" + (f", {there} of them are there already" if there else ""), flush=True)
    with writable(planned.folder):
        pass
    if todo:
        with (
            opened(assembly, planned, decode_file) as (model, strength),
            memory_explained(assembly, planned, model),
        ):
            render(planned, model, strength, todo)
    written = write_sheets(planned, again=bool(todo))
    print(f"wrote {len(todo)} clips" + "".join(f", {path.name}" for path in written) + f" to {planned.folder}")


def _numbers(option: str, text: str | None, kind: type[Any]) -> tuple[Any, ...]:
    """The numbers of a comma-separated option, each once. Raises ConfigError."""
    if text is None:
        return ()
    try:
        found = tuple(dict.fromkeys(kind(word) for word in text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(abs(each) < float("inf") and (kind is float or each >= 0) for each in found):
        raise ConfigError(
            f"{option} {text!r} is no list of numbers", where="command line", allowed="such as 0,0.5,1 or 1,2"
        )
    return found
