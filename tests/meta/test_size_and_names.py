"""The house's limits: short files, short functions, a small core, nothing about the machine it was made on."""

from __future__ import annotations

import ast
import io
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE_LINES = 400
FUNCTION_LINES = 60
CORE_LINES = 5000
OUTSIDE_THE_CORE_COUNT = ("cli", "builtin", "testing")
GRAB_BAGS = {"utils.py", "util.py", "helpers.py", "helper.py", "misc.py", "common.py", "tools.py"}


def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks, or would."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [path for name in sorted(set(listed.split("\0"))) if name and (path := ROOT / name).is_file()]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings (bare strings)."""
    source = path.read_text(encoding="utf-8")
    bare = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in silent
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(lines - bare)


def test_files_are_short() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): count
        for path in tracked("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > FILE_LINES
    }
    assert not long


def test_functions_are_short() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": length
        for path in tracked("*.py")
        for node in functions(path)
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES
    }
    assert not long


def test_the_core_stays_small() -> None:
    core = ROOT / "core" / "tuner"
    counted = [path for path in tracked("core/*.py") if path.relative_to(core).parts[0] not in OUTSIDE_THE_CORE_COUNT]
    assert counted
    assert sum(map(code_lines, counted)) <= CORE_LINES


def test_no_module_is_a_grab_bag() -> None:
    assert not [path for path in tracked("*.py") if path.name in GRAB_BAGS]


def test_nothing_names_the_machine_or_an_index() -> None:
    """Paths of one machine and hosts of package indexes would not hold for anyone else."""
    # Put together here, so that this file does not hold them itself.
    forbidden = [
        *("/" + name + "/" for name in ("work", "root", "home/runner")),
        *(".".join(name) for name in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))),
        "--index" + "-url",
        "extra-index" + "-url",
        "seed" + "-config",
    ]
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in tracked()
        if path.suffix not in {".safetensors", ".mp4", ".png", ".npz"}
        for word in forbidden
        if word.encode() in path.read_bytes()
    ]
    assert not found


def test_public_functions_are_documented() -> None:
    """In the core and the plugins every public module, class, function and method says what it does."""
    silent = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in tracked("core/*.py", "plugins/*.py")
        for name in undocumented(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public names without a docstring; bodies of functions are not looked into."""
    if tree.body and not ast.get_docstring(tree):
        yield "the module"
    pending: list[tuple[str, ast.stmt]] = [("", node) for node in tree.body]
    while pending:
        prefix, node = pending.pop()
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        overload = any(isinstance(each, ast.Name) and each.id == "overload" for each in node.decorator_list)
        if not ast.get_docstring(node) and not overload:
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            pending += [(f"{prefix}{node.name}.", inner) for inner in node.body]
