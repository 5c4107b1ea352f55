"""The manager's lints, and whose hook an exception, a metric or a registry entry belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import tuner
from tuner.assembly import assemble
from tuner.errors import PluginError
from tuner.manager import Manager, hooks_of
from tuner.plugin import Plugin, PluginConfig
from tuner.selection import Catalog

MakeCatalog = Callable[..., Catalog]


def add(cls: type[Plugin[Any]], name: str = "mine", manager: Manager | None = None) -> Manager:
    manager = manager or Manager()
    manager.add(name, cls(name, PluginConfig()))
    return manager


def test_a_misspelt_hook_is_refused_with_the_nearest_name() -> None:
    class Misspelt(Plugin[Any]):
        @tuner.hookimpl
        def on_train_ende(self, run: Any) -> None: ...

    with pytest.raises(PluginError, match="plugin 'mine' implements an unknown hook 'on_train_ende'") as caught:
        add(Misspelt)
    assert "did you mean 'on_train_end'?" in str(caught.value)


def test_a_hook_without_its_mark_is_refused() -> None:
    class Unmarked(Plugin[Any]):
        def save(self, run: Any, model: Any, directory: Any) -> list[Any]:
            return []

    with pytest.raises(PluginError, match="defines 'save' without @hookimpl"):
        add(Unmarked)


def test_a_default_argument_and_an_unknown_one_are_refused() -> None:
    class Default(Plugin[Any]):
        @tuner.hookimpl
        def validate(self, run: Any, model: Any = None) -> None: ...

    class Unknown(Plugin[Any]):
        @tuner.hookimpl
        def save(self, run: Any, folder: Any) -> None: ...

    with pytest.raises(PluginError, match="argument 'model' has a default"):
        add(Default)
    with pytest.raises(PluginError, match="an argument 'folder' that the hook does not pass") as caught:
        add(Unknown)
    assert "run, model, directory" in str(caught.value)


def test_a_single_answer_hook_answered_twice_names_both(make_catalog: MakeCatalog) -> None:
    class SecondRouter(Plugin[Any]):
        """Routes, too."""

        @tuner.hookimpl
        def route_tokens(self, run: Any) -> list[Any]:
            return []

    catalog = make_catalog(second=SecondRouter)
    with pytest.raises(PluginError, match="hook 'route_tokens' takes one answer, but plugins 'router' and 'second'"):
        assemble({}, plugins=["fake", "router", "second"], catalog=catalog)


def test_a_wrapper_is_no_second_answer(make_catalog: MakeCatalog) -> None:
    class Louder(Plugin[Any]):
        """Changes the loss."""

        @tuner.hookimpl(wrapper=True)
        def compute_loss(self, run: Any) -> Iterator[None]:
            loss = yield
            return f"louder {loss}"

    assembly = assemble({}, plugins=["fake", "louder"], catalog=make_catalog(louder=Louder))
    assert assembly.manager.hook.compute_loss(run=None, model=None, batch=None) == "louder loss"
    assert assembly.manager.collect("compute_loss", run=None, model=None, batch=None) == [("fake", "louder loss")]


def test_a_family_that_leaves_a_required_hook_out_is_refused(make_catalog: MakeCatalog) -> None:
    class Half(Plugin[Any]):
        """Half a family."""

        provides = frozenset({"model-family"})

    with pytest.raises(PluginError, match="no loaded plugin implements the hook 'compute_loss'"):
        assemble({"model_family": "half"}, catalog=make_catalog(half=Half))


def test_an_exception_in_a_hook_names_hook_and_plugin_however_deep() -> None:
    def deep() -> None:
        raise ZeroDivisionError("oh")

    class Innocent(Plugin[Any]):
        @tuner.hookimpl
        def on_train_start(self, run: Any) -> None: ...

    class Faulty(Plugin[Any]):
        @tuner.hookimpl
        def on_train_start(self, run: Any) -> None:
            deep()

    manager = add(Innocent, "a", add(Faulty, "faulty", add(Innocent, "b")))
    with pytest.raises(ZeroDivisionError) as caught:
        manager.hook.on_train_start(run=None, model=None)
    assert caught.value.__notes__ == ["in hook 'on_train_start' of plugin 'faulty'"]


def test_collect_says_whose_answer_it_is_and_leaves_out_none() -> None:
    class Number(Plugin[Any]):
        @tuner.hookimpl
        def validate(self, run: Any) -> int:
            return len(self.name)

    class Silent(Plugin[Any]):
        @tuner.hookimpl
        def validate(self, run: Any) -> None: ...

    manager = add(Number, "ab", add(Silent, "silent", add(Number, "abc")))
    assert manager.collect("validate", run=None, model=None) == [("ab", 2), ("abc", 3)]
    assert manager.collect("save", run=None, model=None, directory=None) == []


def test_what_a_generator_raises_is_blamed_on_its_plugin() -> None:
    class Lazy(Plugin[Any]):
        @tuner.hookimpl
        def model_transforms(self, run: Any) -> Iterator[str]:
            yield "one"
            if self.name == "faulty":
                raise RuntimeError("late")

    assert add(Lazy, "fine").collect("model_transforms", run=None, model=None) == [("fine", ["one"])]
    with pytest.raises(RuntimeError) as caught:
        add(Lazy, "faulty").collect("model_transforms", run=None, model=None)
    assert caught.value.__notes__ == ["in hook 'model_transforms' of plugin 'faulty'"]


def test_registry_merges_and_refuses_two_offers_of_one_name() -> None:
    class Offers(Plugin[Any]):
        @tuner.hookimpl
        def quantizers(self, run: Any) -> Any:
            return {"shared" if self.name in ("a", "b") else self.name: self.name}

    class NoMapping(Plugin[Any]):
        @tuner.hookimpl
        def quantizers(self, run: Any) -> Any:
            return ["int8"]

    run: Any = None
    assert add(Offers, "x", add(Offers, "a")).registry("quantizers", run) == {"shared": "a", "x": "x"}
    with pytest.raises(PluginError, match="quantizers: 'shared' is offered by plugin 'a' and by plugin 'b'"):
        add(Offers, "a", add(Offers, "b")).registry("quantizers", run)
    with pytest.raises(PluginError, match="of plugin 'mine' must return a mapping, not list"):
        add(NoMapping).registry("quantizers", run)


def test_hooks_of_lists_what_a_class_implements(make_catalog: MakeCatalog) -> None:
    assert hooks_of(make_catalog().load("fake")) == [
        "compute_loss",
        "describe_model",
        "encode_batch",
        "fill_cache",
        "load_model",
        "plan_epochs",
        "prepare_data",
    ]
