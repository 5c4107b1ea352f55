"""Which plugins a config loads, in which order, and every way in which the choice can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuner.assembly import assemble, selection_of
from tuner.errors import PluginError, TunerError
from tuner.plugin import Plugin
from tuner.selection import Catalog, discover
from tuner.testing.plugin_env import importable, write_distribution

FAMILY = {"model_family": "fake"}
MakeCatalog = Callable[..., Catalog]


def loaded(raw: dict[str, Any], catalog: Catalog, **choice: Any) -> list[str]:
    return list(selection_of(raw, catalog, **choice).classes)


def test_config_alone_selects_the_family_and_built_ins(catalog: Catalog) -> None:
    assert loaded(FAMILY, catalog) == ["always", "fake"]


def test_a_key_of_a_plugin_selects_it_and_the_reason_is_told(catalog: Catalog) -> None:
    chosen = selection_of({**FAMILY, "router_routes": []}, catalog)
    assert list(chosen.classes) == ["always", "fake", "router"]
    assert chosen.reasons["router"] == "owns router_routes"
    assert chosen.reasons["saver"] == "no key or value of its own in the config"


def test_a_value_of_a_core_key_selects_the_plugin_that_serves_it(catalog: Catalog) -> None:
    assert "kernel" in loaded({**FAMILY, "attention_mechanism": "swift"}, catalog)
    assert "kernel" not in loaded({**FAMILY, "attention_mechanism": "diffusers"}, catalog)


def test_an_exact_list_loads_nothing_else_but_built_ins(catalog: Catalog) -> None:
    raw = {**FAMILY, "router_routes": [], "saver_depth": 3}
    assert loaded(raw, catalog, plugins=["fake", "router"]) == ["always", "fake", "router"]
    assert loaded({**raw, "plugins": ["fake"]}, catalog) == ["always", "fake"]
    assert loaded({**raw, "plugins": "fake,saver"}, catalog) == ["always", "fake", "saver"]


def test_the_list_given_beside_the_config_replaces_the_configs(catalog: Catalog) -> None:
    assert loaded({"plugins": ["fake", "saver"]}, catalog, plugins=["other"]) == ["always", "other"]


def test_with_an_exact_list_the_family_is_the_one_in_it(catalog: Catalog) -> None:
    assert loaded({}, catalog, plugins=["other"]) == ["always", "other"]


def test_another_family_is_not_loaded_for_a_key_of_its_own(catalog: Catalog) -> None:
    assembly = assemble({**FAMILY, "other_width": 4}, catalog=catalog)
    assert list(assembly.plugins) == ["always", "fake"]
    assert assembly.notes == ("set aside: other_width (plugin 'other' is not loaded)",)


def test_without_unloads_plugins_and_built_ins(catalog: Catalog) -> None:
    raw = {**FAMILY, "router_routes": [], "without": ["always"]}
    assert loaded(raw, catalog, without=["router"]) == ["fake"]


def test_order_depends_on_the_set_alone(catalog: Catalog) -> None:
    one = loaded({}, catalog, plugins=["router", "kernel", "fake", "saver"])
    assert one == loaded({}, catalog, plugins=["saver", "fake", "kernel", "router"])
    backwards = Catalog(dict(reversed(catalog.installed.items())))
    assert one == loaded({}, backwards, plugins=["fake", "router", "saver", "kernel"])


def test_a_required_plugin_comes_first(make_catalog: MakeCatalog) -> None:
    class Early(Plugin[Any]):
        """Needs a plugin that its name would put behind it."""

        requires = frozenset({"token-router"})

    catalog = make_catalog(early=Early)
    order = loaded(FAMILY, catalog, plugins=["early", "fake", "router"])
    assert order.index("router") < order.index("early")


def test_hooks_are_called_in_that_order(make_catalog: MakeCatalog) -> None:
    import tuner

    class First(Plugin[Any]):
        """First by name."""

        @tuner.hookimpl
        def extra_captions(self, run: Any) -> list[str]:
            return [self.name]

    catalog = make_catalog(b=First, a=First, c=First)
    assembly = assemble({}, plugins=["c", "a", "fake", "b"], catalog=catalog)
    assert assembly.manager.hook.extra_captions(run=None) == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(
    ("raw", "choice", "expected"),
    [
        ({"model_family": "fak"}, {}, ["no installed plugin brings the model family 'fak'", "did you mean 'fake'?"]),
        ({}, {"plugins": ["fake", "ruter"]}, ["no installed plugin is named 'ruter'", "did you mean 'router'?"]),
        (FAMILY, {"without": ["savr"]}, ["no installed plugin is named 'savr'", "did you mean 'saver'?"]),
        ({}, {"plugins": ["fake", "other"]}, ["two model families are selected: 'fake' and 'other'"]),
        ({}, {}, ["no model family is selected", "fake, other", "set `model_family`"]),
        (FAMILY, {"plugins": ["router"]}, ["no model family is selected", "name a model family in `plugins`"]),
        (FAMILY, {"plugins": ["other"]}, ["model_family is 'fake'", "'other'"]),
        (FAMILY, {"without": ["fake"]}, ["no model family is selected", "do not leave 'fake' out"]),
        ({"model_family": "router"}, {}, ["no installed plugin brings the model family 'router'", "fake, other"]),
        ({"model_famly": "fake"}, {}, ["there is no config key 'model_famly'", "did you mean 'model_family'?"]),
    ],
)
def test_a_wrong_choice_is_one_clear_error(
    raw: dict[str, Any], choice: dict[str, Any], expected: list[str], catalog: Catalog
) -> None:
    with pytest.raises(TunerError) as caught:
        assemble(raw, catalog=catalog, **choice)
    for text in expected:
        assert text in str(caught.value)


def test_an_unmet_requirement_names_who_could_meet_it(make_catalog: MakeCatalog) -> None:
    class Needy(Plugin[Any]):
        """Needs a router."""

        requires = frozenset({"token-router"})

    with pytest.raises(PluginError, match="'needy' requires 'token-router'") as caught:
        assemble({}, plugins=["fake", "needy"], catalog=make_catalog(needy=Needy))
    assert "add 'router'" in str(caught.value)


def test_plugins_that_require_each_other_are_named_in_a_circle(make_catalog: MakeCatalog) -> None:
    class One(Plugin[Any]):
        """One."""

        requires = frozenset({"two"})

    class Two(Plugin[Any]):
        """Two."""

        requires = frozenset({"one"})

    with pytest.raises(PluginError, match="one -> two -> one"):
        assemble({}, plugins=["fake", "one", "two"], catalog=make_catalog(one=One, two=Two))


def test_a_selected_plugin_that_fails_to_import_is_fatal_and_named(make_catalog: MakeCatalog) -> None:
    with pytest.raises(PluginError, match="plugin 'saver' failed to import: ModuleNotFoundError") as caught:
        assemble({}, plugins=["fake", "saver"], catalog=make_catalog(saver=None))
    assert "package-saver 1.2" in str(caught.value)


def test_a_broken_plugin_that_nobody_named_does_not_stop_a_run(make_catalog: MakeCatalog) -> None:
    catalog = make_catalog(saver=None)
    assert "saver" not in assemble(FAMILY, catalog=catalog).plugins
    assert not catalog.broken, "nothing forced the question, so nothing of it was imported"
    assembly = assemble({**FAMILY, "router_routes": []}, catalog=catalog)
    assert any(note.startswith("not considered: plugin 'saver' failed to import") for note in assembly.notes)


def test_an_unknown_key_points_at_plugins_that_could_not_be_imported(make_catalog: MakeCatalog) -> None:
    with pytest.raises(TunerError, match="there is no config key 'saver_depth'") as caught:
        assemble({**FAMILY, "saver_depth": 1}, catalog=make_catalog(saver=None))
    assert "plugin 'saver' failed to import" in str(caught.value)


def test_a_class_that_is_no_plugin_and_another_hook_version_are_refused(make_catalog: MakeCatalog) -> None:
    class Old(Plugin[Any]):
        """Made for hooks that are gone."""

        api = 0

    catalog = make_catalog(odd=int, old=Old)
    with pytest.raises(PluginError, match=r"plugin 'odd' is no tuner\.Plugin subclass"):
        assemble({}, plugins=["fake", "odd"], catalog=catalog)
    with pytest.raises(PluginError, match="plugin 'old' was written for version 0 of the hooks; this is version 1"):
        assemble({}, plugins=["fake", "old"], catalog=catalog)


def test_conflicts_are_judged_between_active_plugins_only(make_catalog: MakeCatalog) -> None:
    class Rival(Plugin[Any]):
        """Wants the memory for itself."""

        conflicts = frozenset({"saver"})

    catalog = make_catalog(rival=Rival)
    raw = {**FAMILY, "plugins": ["fake", "rival", "saver"]}
    assert "saver" in assemble(raw, catalog=catalog).plugins, "an idle plugin is no conflict"
    with pytest.raises(PluginError, match=r"'rival' \(package-rival 1.2\) and 'saver' \(package-saver 1.2\)"):
        assemble({**raw, "saver_enabled": True}, catalog=catalog)


def test_installed_packages_are_found_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    one = write_distribution(tmp_path / "one", "first-package", {"same_name": "nowhere:Plugin"}, version="1.0")
    two = write_distribution(tmp_path / "two", "second-package", {"same_name": "elsewhere:Plugin"}, version="2.0")
    with importable(one):
        found = discover()["same_name"]
        assert (found.package, found.version, found.builtin) == ("first-package", "1.0", False)
    with (
        importable(one, two),
        pytest.raises(PluginError, match="two packages have a plugin named 'same_name'") as caught,
    ):
        discover()
    assert "first-package 1.0" in str(caught.value)
    assert "second-package 2.0" in str(caught.value)


def test_a_package_cannot_take_the_name_of_a_built_in(tmp_path: Path) -> None:
    folder = write_distribution(tmp_path / "one", "taker", {"lora": "nowhere:Plugin"})
    with (
        importable(folder),
        pytest.raises(PluginError, match="two packages have a plugin named 'lora': built in and taker"),
    ):
        discover()
