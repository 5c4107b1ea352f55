"""The command line as a user sees it: what it prints, its exit codes, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tuner
from tuner import cli
from tuner.testing.plugin_env import importable, toy_distribution, write_distribution

HEAVY = ("torch", "diffusers", "transformers", "pydantic", "pluggy", "rich", "numpy")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and an environment that sets no keys."""
    monkeypatch.chdir(tmp_path)
    for variable in ("TRAINER_EXTRA_ARGS", "WAN_FEED_FORWARD_CHUNK_SIZE", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture
def config(workplace: Path) -> Path:
    (workplace / "config").mkdir()
    path = workplace / "config/config.json"
    path.write_text(json.dumps({"model_family": "wan", "data_backend_config": "no-such-list.json"}))
    return path


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run ``tuner WORDS`` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["tuner", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    code = f"import sys, tuner.cli; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_help_and_version_import_nothing_heavy_either() -> None:
    for words in (["--help"], ["--version"]):
        code = (
            "import sys\nfrom tuner import cli\n"
            f"sys.argv = ['tuner', *{words!r}]\n"
            "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
            f"print('imported:', *[name for name in {HEAVY!r} if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip().splitlines()[-1] == "imported:", words


def test_listing_plugins_imports_no_torch(config: Path) -> None:
    code = (
        "import sys\nfrom tuner import cli\nsys.argv = ['tuner', 'plugins']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print('imported:', *[name for name in ('torch', 'diffusers', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "imported:"


def test_help_names_the_commands_and_hides_the_alias(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    for command in ("run", "cache", "check", "plugins"):
        assert f"\n  {command} " in out
    assert "train " not in out
    assert call(monkeypatch, "--version") == 0
    assert tuner.__version__ in capsys.readouterr().out


def test_no_config_is_one_line_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: there is no config/config.json in this folder\n")
    assert "--config PATH" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["run", "train", "cache", "check"])
def test_each_command_on_a_config_takes_keys_as_flags_and_refuses_others(
    command: str, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, command, "--learnin_rate", "5e-5") == 2
    err = capsys.readouterr().err
    assert "error: there is no flag --learnin_rate" in err
    assert "did you mean '--learning_rate'?" in err
    assert call(monkeypatch, command, "--learning_rate", "5e-5", "--seed=many", "--max_train_steps", "1.5") == 2
    err = capsys.readouterr().err
    assert 'error: seed cannot be "many"\n  where:   command line' in err
    assert 'error: max_train_steps cannot be "1.5"' in err


def test_what_is_loaded_and_set_aside_is_said_before_anything_else(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--tread_config", '{"routes": []}', "--without", "tread", "--huber_c", "0.2")
    assert call(monkeypatch, "check", *words) == 2
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("plugins: ")
    for loaded in ("datasets (built in)", "full (built in, idle)", "lora (built in)", "wan (difftuner "):
        assert loaded in lines[0]
    assert "note: set aside: tread_config (plugin 'tread' is left out)" in lines
    assert 'warning: huber_c does nothing: loss_type is "l2"' in lines
    assert "no-such-list.json" in err


def test_only_the_first_process_prints_the_plugins(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert call(monkeypatch, "check") == 2
    assert "plugins:" not in capsys.readouterr().out


def test_plugins_without_and_strict_are_options_of_their_own(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("check", "--plugins", "wan", "--tread_config={}", "--strict")
    assert call(monkeypatch, *words) == 2
    assert "'tread_config' belongs to plugin 'tread', which is not loaded" in capsys.readouterr().err
    assert call(monkeypatch, "check", "--without", "lora,sampling", "--without=tread") == 2
    said = capsys.readouterr().out
    assert "full (built in, idle)" in said
    assert "lora" not in said
    assert call(monkeypatch, "check", "--without", "tred") == 2
    assert "did you mean 'tread'?" in capsys.readouterr().err


def test_debug_shows_the_traceback(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "check", "--debug", "--seed=many") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert 'seed cannot be "many"' in err


@pytest.mark.parametrize("command", [["plugins"], ["plugins", "list"]])
def test_the_list_of_plugins_says_what_each_is_and_why_it_is_loaded(
    command: list[str], config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *command, "--without", "sampling") == 0
    out = capsys.readouterr().out
    line = {row.split()[0]: row for row in out.splitlines() if not row.startswith(" ")}
    assert line["wan"].split()[1:3] == [tuner.__version__, "difftuner"]
    assert "loaded: is the model family" in line["wan"]
    assert "not loaded: no key or value of its own in the config" in line["tread"]
    assert "not loaded: left out by `without`" in line["sampling"]
    assert "built in" in line["lora"]
    entry = out[out.index("\ntread ") :]
    assert "hooks: " in entry
    assert "route_tokens" in entry
    assert "keys:  tread_config" in entry


def test_the_list_is_shown_although_the_config_is_wrong_or_absent(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plugins") == 0
    assert "no config/config.json here" in capsys.readouterr().out
    (workplace / "bad.json").write_text('{"model_family": "wam"}')
    assert call(monkeypatch, "plugins", "--config", "bad.json") == 0
    out, err = capsys.readouterr()
    assert "\nwan " in out
    assert "did you mean 'wan'?" in err


def test_one_plugin_is_shown_in_full(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "plugins", "show", "chunked_ff") == 0
    out = capsys.readouterr().out
    assert "chunked_ff (difftuner " in out
    assert "enable_chunked_feed_forward (true or false; default false)" in out
    assert "$WAN_FEED_FORWARD_CHUNK_SIZE" in out
    assert call(monkeypatch, "plugins", "show", "thread") == 2
    assert "did you mean 'tread'?" in capsys.readouterr().err


def test_an_installed_plugin_that_fails_to_import_is_named_when_selected_and_harmless_otherwise(
    workplace: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = {"broken_plugin": "import a_package_nobody_has\n"}
    folder = write_distribution(workplace / "site", "broken-one", {"broken": "broken_plugin:P"}, modules=modules)
    with importable(folder):
        assert call(monkeypatch, "check", "--plugins", "wan,broken") == 2
        out, err = capsys.readouterr()
        assert "error: plugin 'broken' failed to import: ModuleNotFoundError" in err
        assert "broken-one 0.1.0" in err
        assert "plugins:" not in out, "nothing has begun"
        call(monkeypatch, "check")
        out, err = capsys.readouterr()
        assert "note: not considered: plugin 'broken' failed to import" in out
        assert "no-such-list.json" in err, "the run goes on to the next fault"
        assert call(monkeypatch, "plugins") == 0
        assert "  plugin 'broken' failed to import" in capsys.readouterr().out


def test_two_families_are_refused_by_name(
    workplace: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with importable(toy_distribution(workplace / "site")):
        assert call(monkeypatch, "check", "--plugins", "wan,toy") == 2
    assert "two model families are selected: 'toy' and 'wan'" in capsys.readouterr().err
