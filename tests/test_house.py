"""The shape of the project: who may import whom, how long files and lines may be, the README."""
import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

from tiny import ROOT, run_command

FOLDERS = ("backbones", "bench", "kernels")
FILES = sorted(ROOT.glob("*.py"))
for folder in FOLDERS:
    FILES += sorted(ROOT.glob(f"{folder}/*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "assets").glob("*.py"))

# Who may import whom, from below to above. A folder stands for its files, which may import each
# other; and everyone may import run.
NETWORKS = {"kernels", "backbones", "models", "zoo"}
PICTURES = {"bicubic", "degradation", "png", "files", "leaves", "data"}
MAY_IMPORT = {
    "quiet": set(),
    "parallel": set(),
    "commands": {"parallel"},
    "disk": set(),
    "owner": {"commands", "disk"},
    "run": {"commands", "disk", "owner", "parallel"},
    "download": set(),
    "zoo": {"download"},
    "settings": set(),
    "fitting": {"settings", "parallel"},
    # the method
    "dual": set(),
    "widths": set(),
    "search": {"widths"},
    "replay": set(),
    "prune": {"search", "replay", "widths", "narrow", "pairs"},
    # the networks
    "kernels": {"parallel"},
    "backbones": {"kernels"},
    "narrow": {"backbones"},
    "pairs": {"backbones", "narrow"},
    "own": {"backbones", "narrow", "pairs", "replay"},
    "models": {"kernels", "backbones", "own", "zoo"},
    "graphs": {"kernels"},
    "latency": NETWORKS | {"graphs", "replay", "widths"},
    # the pictures; of the backbones only what a batch is, see below
    "bicubic": set(),
    "png": set(),
    "files": {"png"},
    "leaves": set(),
    "degradation": {"bicubic", "backbones"},
    "data": PICTURES - {"data"} | {"backbones", "download"},
    "cache": {"data"},
    "gather": {"cache", "data", "files", "parallel"},
    "unpaired": PICTURES | {"backbones"},
    # the commands
    "consistency": PICTURES | {"dual"},
    "export": NETWORKS | {"own"},
    "tiles": set(),
    "upscale": NETWORKS | PICTURES | {"consistency", "export", "graphs", "own", "tiles"},
    "evaluate": NETWORKS | PICTURES | {"own", "tiles", "upscale"},
    "crops": PICTURES | {"upscale"},
    "charts": set(),
    "page": PICTURES | {"crops", "charts"},
    "report": NETWORKS | PICTURES | {"upscale", "evaluate", "latency", "crops", "own",
                                            "page"},
    "flags": NETWORKS | {"data", "evaluate", "own", "parallel", "prune", "settings",
                           "upscale"},
    "preflight": NETWORKS | PICTURES | {"dual", "prune", "evaluate", "latency", "report", "flags",
                                        "parallel", "settings"},
    "train": NETWORKS | PICTURES | {"dual", "preflight", "prune", "upscale", "evaluate", "latency",
                                    "report", "fitting", "flags", "gather", "parallel", "settings",
                                    "unpaired"},
}
FREE = {"tour", "bench", "tests"}        # they may import everything, and nothing imports them
READ_FLAGS = {"commands", "download", "export", "own", "upscale", "evaluate", "report", "flags",
              "train", "bench", "kernels"}
COMMANDS = {"data", "export", "upscale", "evaluate", "report", "train", "tour", "bench", "kernels"}
OTHERS = {"README.md", "RESULTS.md", "LICENSE", "requirements.txt", "requirements-dev.txt",
          "pyproject.toml", ".ci", ".gitignore", "assets", "tests"}


def house(file: Path) -> str:
    """The name in the table: "models" for models.py, "kernels" for kernels/switch.py."""
    return file.relative_to(ROOT).with_suffix("").parts[0]


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imported(file: Path) -> list[tuple[str, str]]:
    """(module, name taken from it, or "") of every import in a file, also of those in functions."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            found += [(node.module, alias.name) for alias in node.names]
    return found


# ---- imports ------------------------------------------------------------------------------------
def test_the_table_names_every_file():
    assert {house(file) for file in FILES} == set(MAY_IMPORT) | FREE - {"tests"}


def test_the_table_runs_one_way():
    """There is an order in which every file comes after all that it may import."""
    done = set()
    waiting = dict(MAY_IMPORT)
    while waiting:
        ready = [name for name, allowed in waiting.items() if allowed <= done]
        assert ready, f"a circle among {sorted(waiting)}"
        done |= set(ready)
        for name in ready:
            del waiting[name]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_run_one_way(file):
    me = house(file)
    if me in FREE:
        return
    ours = set(MAY_IMPORT) | FREE
    taken = {module.partition(".")[0] for module, _ in imported(file)} & ours
    assert taken <= MAY_IMPORT[me] | {me, "run", "quiet"}


@pytest.mark.parametrize("name", ["data", "degradation"])
def test_pictures_take_nothing_but_the_batch_from_the_backbones(name):
    taken = [pair for pair in imported(ROOT / f"{name}.py") if pair[0].startswith("backbones")]
    assert taken == [("backbones.base", "SR")]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_commands_read_flags(file):
    if "argparse" in {module for module, _ in imported(file)}:
        assert house(file) in READ_FLAGS
        assert house(file) != "kernels" or file.stem == "compile"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_commands_can_be_started(file):
    guards = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.If)]
    if any("__main__" in ast.unparse(node.test) for node in guards):
        assert house(file) in COMMANDS
        assert house(file) != "kernels" or file.stem == "compile"


# ---- how a file is written ----------------------------------------------------------------------
@pytest.mark.parametrize("file", FILES + TESTS, ids=name_of)
def test_lines_are_at_most_100_columns(file):
    lines = enumerate(file.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > 100] == []


@pytest.mark.parametrize("file", FILES + TESTS, ids=name_of)
def test_a_line_holds_one_statement(file):
    """Neither `a = 1; b = 2` nor `if a: return`."""
    tree = ast.parse(file.read_text())
    starts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    assert sorted(line for line in set(starts) if starts.count(line) > 1) == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_file_is_one_concept(file):
    """At most 460 lines, no function above 60, and it begins by saying what it is."""
    text = file.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 460
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_root_holds_the_house_and_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    top = {name.partition("/")[0] for name in listed.stdout.splitlines()}
    files = {f"{name}.py" for name in set(MAY_IMPORT) | FREE} | set(FOLDERS)
    assert top - files - OTHERS == set()
    assert not (ROOT / "models").exists(), "a folder models/ would hide models.py"


# ---- README -------------------------------------------------------------------------------------
REQUIREMENTS = (ROOT / "requirements.txt").read_text().splitlines()


def test_the_readme_installs_what_is_tested():
    readme = (ROOT / "README.md").read_text()
    pins = [line for line in REQUIREMENTS if line.startswith("torch==")]
    assert len(pins) == 1
    assert "pip install -r requirements.txt" in readme
    assert set(re.findall(r"torch==[\d.]*\d", readme)) <= set(pins)
    assert not any(line.startswith("ruff") for line in REQUIREMENTS)


def documents() -> list[Path]:
    return [file for file in (ROOT / "README.md", ROOT / "RESULTS.md") if file.exists()]


def commands_in(text: str) -> list[tuple[str, list[str]]]:
    """(script or module, its flags) of every `python SCRIPT ...` in a text."""
    found = []
    for line in text.splitlines():
        for module, script, rest in re.findall(
                r"python (?:-m ([\w.]+)|([\w/]+\.py))([^`#|&]*)", line):
            found.append((script or module.replace(".", "/") + ".py",
                          re.findall(r"(?<!\S)--[a-z][\w-]*", rest)))
    return found


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_commands_in_the_documents_exist_with_their_flags(document, monkeypatch, capsys):
    ours = {name_of(file): file for file in FILES}
    helps = {}
    for script, flags in commands_in(document.read_text()):
        if script not in ours:
            assert script.partition("/")[0] not in ("bench", "tests", "kernels"), script
            assert script.endswith("zipfile.py"), f"{script} is no file of this project"
            continue
        if script not in helps and flags:
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            code, helps[script], _ = run_command(module, monkeypatch, capsys, "--help")
            assert code == 0
        for flag in flags:
            assert re.search(rf"{flag}\b", helps[script]), f"{script} has no {flag}"


def test_tests_named_in_the_documents_exist():
    for document in documents():
        named = re.findall(r"pytest (tests/\w+\.py)(?:.*? -k (\w+))?", document.read_text())
        for file, word in named:
            assert (ROOT / file).exists(), f"{document.name} names {file}"
            assert word in (ROOT / file).read_text(), f"{document.name}: no test {word} in {file}"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150


def test_links_and_pictures_of_the_documents_exist():
    for document in documents():
        for target in re.findall(r"\]\(([^)#:\s]+)\)", document.read_text()):
            assert (ROOT / target).exists(), f"{document.name} links to {target}"
