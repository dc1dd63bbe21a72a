"""What is said about the house is checked by the house: lightness, public names, size, cleanliness."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import blip2

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "blip2"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)
PUBLIC = [
    "Blip2",
    "Blip2Config",
    "Blip2Error",
    "Chat",
    "CheckpointError",
    "Classification",
    "ConfigError",
    "DataError",
    "Generation",
    "ImageError",
    "ImageFeatures",
    "ImageIndex",
    "Matches",
    "MissingExtraError",
    "PRESETS",
    "PromptError",
    "Ranking",
    "__version__",
    "load",
]

LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 60
LONGER = {  # `path` or `path:function`, and why it is better in one piece
    "tests/test_image.py": "one short test for every kind of file that claims to be an image",
}


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints; what it says on stderr is the error."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def sources() -> Iterator[tuple[str, Path]]:
    for folder in ("src", "tests", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path


# -- lightness ---------------------------------------------------------------------------------------------------------


def test_importing_blip2_costs_less_than_0_3_seconds_and_no_torch():
    code = "import time; t = time.process_time(); import blip2; print(time.process_time() - t)"
    assert float(python(code)) < 0.3
    code = "import sys, blip2; print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])"
    assert python(code) == "[]\n"


def optional_modules() -> list[str]:
    """Top-level modules of packages that only an extra brings."""
    core, extra = set[str](), set[str]()
    for line in importlib.metadata.requires("blip2") or []:
        (extra if "extra ==" in line else core).add(normal(re.split(r"[\s<>=!~;\[(]", line)[0]))
    homes = importlib.metadata.packages_distributions()
    needed = closure(core)
    only = {package for package in closure(extra) - needed if package != "blip2"}
    return sorted(
        module for module, packages in homes.items() if packages and {normal(name) for name in packages} <= only
    )


def normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def closure(packages: set[str]) -> set[str]:
    """These packages and everything that they need."""
    seen, rest = set[str](), list(packages)
    while rest:
        package = rest.pop()
        if package in seen:
            continue
        seen.add(package)
        try:
            lines = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        rest += [normal(re.split(r"[\s<>=!~;\[(]", line)[0]) for line in lines if "extra ==" not in line]
    return seen


def test_every_module_imports_without_any_extra():
    blocked = optional_modules()
    assert {"transformers", "gguf", "pycocoevalcap", "pytest"} <= set(blocked)
    assert not {"torch", "numpy", "PIL", "pydantic", "typer", "rich"} & set(blocked)
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(blocked)}:
            raise ImportError(f"{{name}} belongs to an extra")
sys.meta_path.insert(0, Refuse())
import importlib
for name in {MODULES}:
    importlib.import_module(name)
"""
    python(code)


# -- public names ------------------------------------------------------------------------------------------------------


def test_public_names_are_these_and_no_others():
    assert sorted(blip2.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(blip2))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name: str):
    assert getattr(blip2, name) is not None


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="no_such_name"):
        blip2.no_such_name  # noqa: B018


def test_type_checkers_see_the_public_names():
    assert (PACKAGE / "py.typed").is_file()
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(PUBLIC) - {"__version__"}


# -- size and cleanliness ----------------------------------------------------------------------------------------------


def test_files_and_functions_stay_readable():
    long: list[str] = []
    for name, path in sources():
        with tokenize.open(path) as file:
            text = file.read()
        if len(text.splitlines()) > LINES_OF_A_FILE:
            long.append(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > LINES_OF_A_FUNCTION:
                    long.append(f"{name}:{node.name}")
    assert sorted(long) == sorted(LONGER), "split it, or give the reason in LONGER; take out what is short again"


def tracked() -> list[Path]:
    """Files that git knows or would take; all files where there is no git (a source archive)."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        return [path for _, path in sources()]
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def test_no_file_names_a_path_of_somebody_s_machine():
    path = re.compile(r"(?<![\w.~*/<>{}$-])/(?:work|root|farm|mnt|(?:home|Users)/(?!me\b))/?\w")
    found = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in tracked()
        if file.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ""} and file != Path(__file__)
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
        if path.search(line)
    ]
    assert found == []


def test_nothing_is_left_for_later_in_silence():
    marks = re.compile(r"\b(?:TODO|FIXME|XXX|NotImplementedError)\b")
    found = [name for name, path in sources() if path != Path(__file__) and marks.search(path.read_text("utf-8"))]
    assert found == []


def test_every_folder_with_code_is_a_package_so_that_wheels_hold_it():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
