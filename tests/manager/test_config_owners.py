"""Whose each key and value is, what is set aside, and what may not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import tuner
from tuner.assembly import assemble, new_run
from tuner.cli.flags import Settings
from tuner.errors import ConfigError, PluginError, TunerError
from tuner.plugin import Plugin, PluginConfig, key
from tuner.selection import Catalog

FAMILY = {"model_family": "fake"}
EXACT = {"plugins": ["fake"]}
MakeCatalog = Callable[..., Catalog]


def refusal(raw: dict[str, Any], catalog: Catalog, **choice: Any) -> str:
    with pytest.raises(TunerError) as caught:
        assemble(raw, catalog=catalog, **choice)
    return str(caught.value)


def test_each_owner_gets_its_keys_and_the_run_knows_which_were_set(catalog: Catalog) -> None:
    raw = {**FAMILY, "seed": 7, "saver_enabled": "true", "routes": [{"ratio": 0.5}]}
    assembly = assemble(raw, catalog=catalog)
    assert assembly.core.seed == 7
    assert assembly.plugins["saver"].config.saver_enabled is True
    assert assembly.plugins["router"].config.router_routes[0].ratio == 0.5
    assert assembly.explicit == {"model_family", "seed", "saver_enabled", "router_routes"}
    run = new_run(assembly)
    assert run.config is assembly.core
    assert run.plugins is assembly.plugins
    assert run.step == 0


def test_keys_of_an_unloaded_plugin_are_set_aside_with_one_line(catalog: Catalog) -> None:
    assembly = assemble({**EXACT, "router_routes": [], "saver_depth": 3}, catalog=catalog)
    assert assembly.notes == (
        "set aside: router_routes (plugin 'router' is not loaded)",
        "set aside: saver_depth (plugin 'saver' is not loaded)",
    )
    assert assembly.explicit == {"plugins"}
    left_out = assemble({**FAMILY, "router_routes": []}, without=["router"], catalog=catalog)
    assert left_out.notes == ("set aside: router_routes (plugin 'router' is left out)",)
    assert left_out.core.without == ["router"]


def test_strict_makes_set_aside_keys_an_error(catalog: Catalog) -> None:
    raw = {**EXACT, "router_routes": []}
    assert "'router_routes' belongs to plugin 'router', which is not loaded" in refusal(raw, catalog, strict=True)
    assert "`strict` is set" in refusal({**raw, "strict": "true"}, catalog)
    assert 'strict cannot be "perhaps"' in refusal({**EXACT, "strict": "perhaps"}, catalog)
    assert assemble({**raw, "strict": True}, strict=False, catalog=catalog).core.strict is False


def test_a_key_with_an_effect_is_not_silently_set_aside(catalog: Catalog) -> None:
    text = refusal({**EXACT, "saver_enabled": True}, catalog)
    assert "'saver_enabled' belongs to plugin 'saver'" in text
    assert "the memory needed would change" in text
    assert "--without saver" in text
    at_default = assemble({**EXACT, "saver_enabled": "false"}, catalog=catalog)
    assert at_default.notes == ("set aside: saver_enabled (plugin 'saver' is not loaded)",)
    agreed = assemble({**EXACT, "saver_enabled": True}, without=["saver"], catalog=catalog)
    assert agreed.notes == ("set aside: saver_enabled (plugin 'saver' is left out)",)


def test_a_value_of_an_unloaded_plugin_falls_back_to_the_default(catalog: Catalog) -> None:
    assembly = assemble({**EXACT, "attention_mechanism": "swift"}, catalog=catalog)
    assert assembly.core.attention_mechanism == "diffusers"
    assert assembly.notes == (
        "set aside: attention_mechanism 'swift' (plugin 'kernel' is not loaded); 'diffusers' is used",
    )
    assert "attention_mechanism" not in assembly.explicit
    assert "belongs to plugin 'kernel'" in refusal({**EXACT, "attention_mechanism": "swift"}, catalog, strict=True)


def test_a_precision_of_an_unloaded_plugin_needs_without(catalog: Catalog) -> None:
    raw = {**EXACT, "base_model_precision": "int7-fake"}
    assert "the memory needed would change" in refusal(raw, catalog)
    assert assemble(raw, without=["kernel"], catalog=catalog).core.base_model_precision == "no_change"
    assert assemble({**raw, "plugins": ["fake", "kernel"]}, catalog=catalog).core.base_model_precision == "int7-fake"


def test_a_value_that_nothing_provides_is_an_error_with_the_nearest(catalog: Catalog) -> None:
    text = refusal({**FAMILY, "base_model_precision": "int7-fak"}, catalog)
    assert 'base_model_precision is "int7-fak", which nothing provides' in text
    assert "did you mean 'int7-fake'?" in text


def test_everything_wrong_with_a_config_comes_in_one_message_with_its_place(catalog: Catalog) -> None:
    raw = Settings()
    raw.put({**FAMILY, "learnin_rate": 1, "seed": "many"}, "run.json")
    raw.put({"router_routes": [{"ratio": 2, "frist": 1}], "mixed_precision": "bf61"}, "command line")
    text = refusal(raw, catalog)
    assert (
        "there is no config key 'learnin_rate'\n  where:   run.json\n  nearest: did you mean 'learning_rate'?" in text
    )
    assert 'seed cannot be "many"' in text
    assert "allowed: whole number, ≥ 0" in text
    assert "router_routes[0].ratio cannot be 2\n  where:   command line\n  allowed: number, ≥ 0, < 1" in text
    assert "router_routes[0] has no key 'frist'" in text
    assert "did you mean 'first'?" in text
    assert 'mixed_precision cannot be "bf61"' in text
    assert "nearest: did you mean 'bf16'?" in text


def test_two_owners_of_one_key_are_both_named(make_catalog: MakeCatalog) -> None:
    class Greedy(PluginConfig):
        seed: int = key(1, "Taken.")

    class Twin(PluginConfig):
        saver_depth: int = key(1, "Taken.")

    class TakesCore(Plugin[Any]):
        """Takes a core key."""

        Config = Greedy

    class TakesOther(Plugin[Any]):
        """Takes another plugin's key."""

        Config = Twin

    catalog = make_catalog(core_taker=TakesCore, twin=TakesOther)
    with pytest.raises(PluginError, match="'seed' is claimed by core and by plugin 'core_taker'"):
        assemble({}, plugins=["fake", "core_taker"], catalog=catalog)
    with pytest.raises(PluginError, match="'saver_depth' is claimed by plugin 'saver' and by plugin 'twin'"):
        assemble({}, plugins=["fake", "saver", "twin"], catalog=catalog)


def test_a_key_under_two_spellings_is_an_error(catalog: Catalog) -> None:
    with pytest.raises(ConfigError, match="'router_routes' is given twice, as 'routes' and as 'router_routes'"):
        assemble({**FAMILY, "routes": [], "router_routes": []}, catalog=catalog)


def test_only_what_forces_a_question_is_imported(make_catalog: MakeCatalog, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    catalog = make_catalog()
    load = catalog.load
    monkeypatch.setattr(catalog, "load", lambda name: (asked.append(name), load(name))[1])
    assemble({"plugins": ["fake", "saver"], "saver_depth": 1, "seed": 3}, catalog=catalog)
    assert set(asked) == {"always", "fake", "saver"}


def test_a_plugin_refuses_in_configure_and_is_named(make_catalog: MakeCatalog) -> None:
    class Picky(Plugin[Any]):
        """Refuses."""

        @tuner.hookimpl
        def configure(self, run: Any) -> None:
            raise ConfigError(f"seed {run.config.seed} is unlucky")

    with pytest.raises(ConfigError, match="seed 13 is unlucky") as caught:
        assemble({"seed": 13}, plugins=["fake", "picky"], catalog=make_catalog(picky=Picky))
    assert caught.value.__notes__ == ["in hook 'configure' of plugin 'picky'"]


def test_a_bare_flag_for_a_number_is_refused(catalog: Catalog) -> None:
    assert 'seed cannot be "true"' in refusal({**FAMILY, "seed": True}, catalog)
