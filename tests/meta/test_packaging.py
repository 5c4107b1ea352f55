"""What is shipped, linted, typed and tested is the same set of packages, and it is all of them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tuner.builtin import BUILTINS

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def plugin_packages() -> set[str]:
    """Folders of the plugins' packages, relative to the repository."""
    return {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("plugins/*/tuner_*/__init__.py")}


def test_the_wheel_ships_every_package() -> None:
    listed = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert set(listed) == {"core/tuner", *plugin_packages()}
    assert len(listed) == len(set(listed))


def test_every_plugin_has_an_entry_point_and_every_entry_point_a_plugin() -> None:
    targets = PROJECT["project"]["entry-points"]["tuner.plugins"].values()
    assert {target.partition(":")[0] for target in targets} == {Path(each).name for each in plugin_packages()}


def test_types_and_tests_cover_every_package() -> None:
    folders = {"core", *(Path(each).parent.as_posix() for each in plugin_packages())}
    packages = {"tuner", *(Path(each).name for each in plugin_packages())}
    tool = PROJECT["tool"]
    assert set(tool["mypy"]["mypy_path"]) == {*folders, "examples/tuner-ltx"}
    assert set(tool["mypy"]["packages"]) == {*packages, "tuner_ltx"}
    assert set(tool["pytest"]["ini_options"]["pythonpath"]) == folders
    assert set(tool["importlinter"]["root_packages"]) == packages


def test_import_contracts_name_every_plugin() -> None:
    plugins = {Path(each).name for each in plugin_packages()}
    core, each_other = PROJECT["tool"]["importlinter"]["contracts"]
    assert (core["type"], core["source_modules"], set(core["forbidden_modules"])) == ("forbidden", ["tuner"], plugins)
    assert (each_other["type"], set(each_other["modules"])) == ("independence", plugins)


def test_packages_are_typed() -> None:
    for package in ("core/tuner", *plugin_packages()):
        assert (ROOT / package / "py.typed").exists(), package


def requirement_name(requirement: str) -> str:
    """The normalised distribution name of a requirement."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def test_constraints_pin_every_requirement_exactly() -> None:
    lines = [
        line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] not in "#"
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][^+\s]*", line) for line in lines)
    pinned = {requirement_name(line) for line in lines}
    assert "torch==2.13.0" in lines
    project = PROJECT["project"]
    wanted = [each for extra in project["optional-dependencies"].values() for each in extra]
    wanted += [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    assert {requirement_name(each) for each in wanted} - {"difftuner"} <= pinned


def test_dev_installs_every_extra_that_tests_need() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    included = re.search(r"\[(.*)\]", next(each for each in extras["dev"] if each.startswith("difftuner[")))
    assert included
    assert set(included[1].split(",")) == set(extras) - {"dev", "cuda", "rocm", "apple"}


def test_every_install_is_constrained() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    installs = [line for line in makefile.splitlines() if "pip install" in line]
    assert installs
    assert all("-c constraints.txt" in line for line in installs)


@pytest.mark.parametrize("command", ["make test", "make quickstart"])
def test_readme_names_the_commands(command: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert command in readme
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_ci_runs_the_readme_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_commands_for_the_real_run_are_the_ones_that_quickstart_prints() -> None:
    readme, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    copies = re.search(r"^for each in (.*); do .*; done$", readme, re.MULTILINE)
    assert copies
    assert copies[0] in makefile.replace("$$", "$")
    assert ".venv/bin/tuner run" in readme
    assert all((ROOT / "config" / f"{name}.json.example").is_file() for name in copies[1].split())


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_names_every_plugin() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in (*PROJECT["project"]["entry-points"]["tuner.plugins"], *BUILTINS))
