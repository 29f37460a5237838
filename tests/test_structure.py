"""What the script promises of its own shape: banners, what each section may use, sizes."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

import ocpp_2w_proxy as p
from tests.readme import commands
from tests.sections import SCRIPT, sections

ROOT = Path(__file__).parent.parent
TEXT = SCRIPT.read_text()
TREE = ast.parse(TEXT)
SECTIONS = sections(TEXT)
BANNERS = [
    "Configuration",
    "Messages",
    "Vocabulary",
    "Routing",
    "Journal",
    "Link",
    "Outbox",
    "Relay",
    "Proxy",
    "Status",
    "Command line",
]
PURE = ["Messages", "Vocabulary", "Routing"]
MOST_LINES = {
    "head": 110,
    "Configuration": 400,
    "Messages": 180,
    "Vocabulary": 440,
    "Routing": 879,
    "Journal": 281,
    "Link": 400,
    "Outbox": 410,
    "Relay": 280,
    "Proxy": 330,
    "Status": 567,
    "Command line": 260,
}
INPUT_AND_OUTPUT = {"asyncio", "log", "logging", "os", "socket", "ssl", "sys", "time", "print", "open"}


def section_of(line: int) -> str:
    """Return the section that a line stands in; "" above the first."""
    return next((name for name, lines in SECTIONS.items() if line in lines), "")


def in_annotations() -> set[ast.AST]:
    """Return all nodes of the annotations, which are never run."""
    roots = [
        root
        for node in ast.walk(TREE)
        for root in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if isinstance(root, ast.AST)
    ]
    return {node for root in roots for node in ast.walk(root)}


def names_in(section: str) -> set[str]:
    """Return every name that a section's code reads."""
    unread = in_annotations()
    return {
        node.id
        for node in ast.walk(TREE)
        if isinstance(node, ast.Name) and section_of(node.lineno) == section and node not in unread
    }


def test_the_sections_stand_in_the_agreed_order() -> None:
    """A newcomer finds the place for a change by the banner."""
    assert list(SECTIONS) == BANNERS


def test_each_section_uses_only_those_above_it() -> None:
    """So that the script can be read from top to bottom."""
    defined = {
        node.name: section_of(node.lineno)
        for node in TREE.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    }
    for section in BANNERS:
        for name in names_in(section) & defined.keys():
            above = defined[name] == "" or BANNERS.index(defined[name]) <= BANNERS.index(section)
            assert above, f"{section} uses {name}, which {defined[name]} defines"


@pytest.mark.parametrize("section", PURE)
def test_a_pure_section_has_no_input_no_output_no_clock_and_no_log(section: str) -> None:
    """A message goes in, decisions come out."""
    assert names_in(section) & INPUT_AND_OUTPUT == set()


def test_functions_are_short() -> None:
    """8 lines of code in the middle, 30 at the most."""
    functions = [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lines = TEXT.splitlines()

    def size(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        body = lines[function.body[0].lineno - 1 : function.end_lineno]
        return sum(1 for line in body if line.strip() and not line.strip().startswith("#"))

    sizes = sorted(map(size, functions))
    assert sizes[len(sizes) // 2] <= 8
    assert sizes[-1] <= 30


def test_each_section_keeps_to_its_size() -> None:
    """Lines of the file; whoever needs more takes it from another section, or finds a smaller shape."""
    sizes = {"head": min(map(min, SECTIONS.values())) - 1} | {name: len(SECTIONS[name]) for name in SECTIONS}
    too_large = {name: size for name, size in sizes.items() if size > MOST_LINES[name]}
    assert too_large == {}
    assert len(TEXT.splitlines()) <= 4600


def test_the_code_keeps_to_its_size() -> None:
    """Lines with a token that is no comment or docstring: 3,600 at the most."""
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    words = [each for each in tokenize.generate_tokens(io.StringIO(TEXT).readline) if each.type not in blank]
    lines = {line for each in words for line in range(each.start[0], each.end[0] + 1)}
    for node in ast.walk(TREE):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # A docstring.
            lines -= {*range(node.lineno, (node.end_lineno or 0) + 1)}
    assert len(lines) <= 3600


def test_no_class_is_large() -> None:
    """400 lines and 40 methods at the most."""
    for node in ast.walk(TREE):
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno < 400, node.name
            methods = [
                item for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))
            ]
            assert len(methods) <= 40, node.name


def test_only_websockets_and_the_standard_library_are_imported() -> None:
    """And no configparser."""
    modules = {
        (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for node in ast.walk(TREE)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert modules - sys.stdlib_module_names == {"websockets"}
    assert "configparser" not in modules


def test_no_exception_is_caught_wholesale() -> None:
    """What nobody expects rises, is logged with its traceback, and ends one connection."""
    caught = [
        ast.unparse(node.type) if node.type else ""
        for node in ast.walk(TREE)
        if isinstance(node, ast.ExceptHandler)
    ]
    assert not {"", "Exception", "BaseException"} & set(caught)


def test_every_key_is_in_the_readme() -> None:
    """Whoever looks for a key finds it in the table."""
    readme = (ROOT / "README.md").read_text()
    for keys in p.SECTIONS.values():
        for name in keys:
            assert f"`{name}`" in readme, f"{name} is not in the README"


def test_every_key_is_in_the_shipped_ini_with_its_default() -> None:
    """As a live line at the left margin; commented out where the default is empty."""
    text = (ROOT / "ocpp-2w-proxy.ini").read_text()
    for section, keys in p.SECTIONS.items():
        part = text.partition(f"\n[{section}]\n")[2].partition("\n[")[0]
        for name, key in keys.items():
            live = re.search(rf"^{name} = (.*)$", part, re.MULTILINE)
            if key["default"]:
                assert live is not None, f"{name} is not in [{section}]"
                assert live[1] == key["default"]
            elif name not in ("server", "secondary_server"):
                assert re.search(rf"^;{name} =", part, re.MULTILINE), f"{name} is not in [{section}]"


def test_every_test_that_the_readme_names_is_there() -> None:
    """Whoever doubts a line of its tables finds the proof."""
    pages = [(ROOT / folder / "README.md").read_text() for folder in (".", "tests")]
    named = set(re.findall(r"`(test_\w+)`", "".join(pages)))
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 15
    assert [name for name in sorted(named) if f"def {name}(" not in tests] == []


def test_every_command_of_the_readme_is_run_by_the_gate() -> None:
    """The console blocks are, as they stand."""
    text = (ROOT / "README.md").read_text()
    run = commands(text)
    assert ".venv/bin/python ocpp_2w_proxy.py --demo" in run
    assert ".venv/bin/python -m pytest" in run
    assert "tests/readme.py" in (ROOT / ".ci" / "run").read_text()
