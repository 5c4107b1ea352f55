"""``tuner cache``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from tuner import processes
from tuner.cli import options
from tuner.errors import ConfigError

if TYPE_CHECKING:
    from tuner.assembly import Assembly
    from tuner.cli.prune import Unused

LISTED = 20


def cache(
    context: typer.Context,
    config: options.Config = None,
    plugins: options.Plugins = None,
    without: options.Without = None,
    strict: options.Strict = False,
    debug: options.Debug = False,
    verify: bool = typer.Option(
        False, "--verify", help="Read and check every entry, also those that were found whole before."
    ),
    prune: bool = typer.Option(False, "--prune", help="Encode nothing; remove entries that this config does not use."),
    dry_run: bool = typer.Option(False, "--dry-run", help="With --prune: only list them."),
    yes: bool = typer.Option(False, "--yes", help="With --prune: do not ask."),
) -> None:
    """Build the cache of encoded clips and captions, and stop."""
    from tuner.cli.report import print_assembly

    with processes.joined():
        with processes.together():
            _check_flags(verify, prune, dry_run, yes)
            assembly = options.assembly(context, config, plugins, without, strict)
            print_assembly(assembly)
        if prune:
            _prune(assembly, dry_run, yes)
        else:
            from tuner import pipeline

            pipeline.cache(assembly, verify=verify)


def _prune(assembly: Assembly, dry_run: bool, yes: bool) -> None:
    """Say what is not in use, and remove it where that is wanted."""
    from tuner.cli.prune import remove, unused_entries

    unused = unused_entries(assembly)
    _show(unused, listed=None if dry_run else LISTED)
    if unused.files and not dry_run and (yes or typer.confirm("remove them?")):
        remove(unused)
        print(f"removed {len(unused.files)} files, {unused.size / 1e6:.1f} MB")


def _check_flags(verify: bool, prune: bool, dry_run: bool, yes: bool) -> None:
    if prune:
        processes.refuse_several("`tuner cache --prune`")
    if not prune and (dry_run or yes):
        raise ConfigError(f"{'--dry-run' if dry_run else '--yes'} goes with --prune", where="command line")
    if prune and verify:
        raise ConfigError("--prune encodes and checks nothing, so it does not go with --verify", where="command line")
    if prune and not (dry_run or yes or sys.stdin.isatty()):
        raise ConfigError(
            "--prune removes files, and there is no terminal to ask on",
            where="command line",
            remedy="look at what would go with --dry-run, then add --yes",
        )


def _show(unused: Unused, listed: int | None) -> None:
    """What would go, by folder; the first ``listed`` files by name, all when None."""
    for root, kept in unused.kept.items():
        sizes = [size for path, size in unused.files.items() if path.parent.parent == root]
        print(f"{root}: {kept} entries in use, {len(sizes)} files not, {sum(sizes) / 1e6:.1f} MB")
        if sizes and not kept:
            print("  none of them is this config's: see whether it is meant, and whether this machine encodes alike")
    paths = list(unused.files)
    for path in paths[:listed]:
        print(f"  {path}")
    if listed is not None and len(paths) > listed:
        print(f"  and {len(paths) - listed} more")
