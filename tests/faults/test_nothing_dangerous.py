"""What the code must never do: unpickle, evaluate text, start a shell, trust a model's code, listen to the network."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("msgrpo_lab", "analysis", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"}


def dangers(tree: ast.AST) -> Iterator[str]:
    """What a module does of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"imports {name}" for name in names if name.partition(".")[0] in UNPICKLERS)
        if isinstance(node, ast.Call):
            yield from _call(ast.unparse(node.func), node)


def _call(name: str, node: ast.Call) -> Iterator[str]:
    named = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in FORBIDDEN_CALLS:
        yield f"calls {name}"
    if name == "torch.load" and not _is(named.get("weights_only"), True):
        yield "calls torch.load without weights_only=True"
    if name in {"yaml.load", "np.load"}:
        yield f"calls {name}"
    for argument in ("shell", "trust_remote_code", "allow_pickle"):
        if argument in named and _is(named[argument], True):
            yield f"calls {name} with {argument}=True"
    if name.endswith("load_from_checkpoint"):
        yield f"calls {name}"


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_does_any_of_it(path: Path) -> None:
    assert list(dangers(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(stream)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "Module.load_from_checkpoint(path)",
    ],
)
def test_each_of_it_would_be_found(text: str) -> None:
    assert list(dangers(ast.parse(text)))


def test_what_is_safe_is_let_through() -> None:
    for text in ("torch.load(path, weights_only=True)", "yaml.safe_load(text)", "model.eval()", "re.compile(text)"):
        assert not list(dangers(ast.parse(text))), text


def commands() -> Iterator[tuple[str, str]]:
    """Lines of the Makefile, the documentation and the configuration that start a server."""
    pages = [ROOT / "Makefile", *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "conf").rglob("*.yaml")]
    for page in pages:
        for line in page.read_text(encoding="utf-8").splitlines():
            if re.search(r"--host|--bind|0\.0\.0\.0", line):
                yield str(page.relative_to(ROOT)), line


def test_servers_in_the_makefile_and_the_pages_bind_to_this_machine() -> None:
    found = list(commands())
    assert found, "the dashboard of make sweep is one"
    for page, line in found:
        assert "0.0.0.0" not in line, f"{page}: {line}"
        for host in re.findall(r"--(?:host|bind)[ =](\S+)", line):
            assert host.strip("`'\"") in {"127.0.0.1", "localhost"}, f"{page}: {line}"
