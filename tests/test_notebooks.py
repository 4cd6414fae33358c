"What holds for every notebook, and that the imports of the package go one way."
import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NBS = ROOT/"nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts))
MODULES = sorted(p for p in (ROOT/"causal_meta").rglob("*.py") if p.name not in ("__init__.py", "__main__.py", "_modidx.py"))
TOOLS = {"nbdev", "fastcore", "execnb", "IPython"}


def name(path: Path) -> str: return path.relative_to(ROOT).as_posix()


@cache
def cells(notebook: Path) -> list[dict]:
    "Its cells, sources joined."
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    for cell in found: cell["source"] = "".join(cell["source"])
    return found


def code(cell: dict) -> ast.Module | None:
    "What a cell means in Python; None for magics and shell commands."
    try: return ast.parse(cell["source"])
    except SyntaxError: return None


def contains(tree: ast.AST, *types) -> bool: return any(isinstance(node, types) for node in ast.walk(tree))


def number(path: Path) -> tuple[int, str] | None:
    "The place of a notebook in the book: 05a comes after 05 and before 06."
    found = re.match(r"(\d+)([a-z]?)_", path.name)
    return (int(found[1]), found[2]) if found else None


@cache
def notebook_of(module: str) -> Path | None:
    "The notebook that a module of the package (datasets.graphs) was written in."
    path = ROOT/"causal_meta"/(module.replace(".", "/") + ".py")
    if not path.is_file(): return None
    found = re.search(r"File to edit: (\S+\.ipynb)", path.read_text(encoding="utf-8"))
    return (path.parent/found[1]).resolve() if found else None


def imported(tree: ast.AST, package: tuple[str, ...]) -> set[str]:
    "The modules of causal_meta (datasets.graphs) that some code imports, itself being in a package: (causal_meta, datasets)."
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): out |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join([*package[:len(package) + 1 - node.level], *filter(None, [node.module])]) if node.level else node.module
            out |= {base, *(f"{base}.{a.name}" for a in node.names)}
    out = {m.removeprefix("causal_meta.") for m in out if m.startswith("causal_meta.")}
    return {m for m in out if notebook_of(m)}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_notebook(notebook):
    title, *rest = [c for c in cells(notebook) if c["cell_type"] != "raw"]
    assert title["cell_type"] == "markdown" and re.fullmatch(r"# .+\n\n> .+", title["source"]), (
        "it begins with a cell of a title, an empty line, and one line that says what it is about; nbdev drops anything else in that cell from the site")
    for cell in rest:
        if cell["cell_type"] != "code": continue
        source = cell["source"]
        assert not [o for o in cell["outputs"] if o["output_type"] == "error"], f"a cell failed:\n{source}"
        said = json.dumps([o.get("text", o.get("data", {}).get("text/plain", "")) for o in cell["outputs"]])
        paths = re.findall(rf"(?:/(?:home|root|tmp|Users)/|{re.escape(str(ROOT))})\S{{0,40}}", source + said)
        assert not paths, f"a path of one machine, {paths[0]}, in the cell:\n{source}"
        exported = re.match(r"#\|\s*exports?i?\b", source)
        assert not exported or source.count("\n") < 60, f"an exported cell of {source.count(chr(10)) + 1} lines"
        tree = code(cell)
        if tree is None or exported or re.match(r"#\|\s*eval:\s*false", source) or not contains(tree, ast.Import, ast.ImportFrom): continue
        assert not contains(tree, ast.Expr, ast.Assign), f"imports are run when the site is built, so they need a cell of their own:\n{source}"


@pytest.mark.parametrize("notebook", [p for p in NOTEBOOKS if number(p)], ids=name)
def test_a_notebook_uses_only_what_comes_before_it(notebook):
    later = {m for c in cells(notebook) if c["cell_type"] == "code" and (tree := code(c)) for m in imported(tree, ())
             if number(notebook_of(m)) and number(notebook_of(m)) > number(notebook)}
    assert not later


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_a_module_uses_only_what_comes_before_it(module):
    tree = ast.parse(module.read_text(encoding="utf-8"))
    place = module.relative_to(ROOT).with_suffix("").parts
    written = notebook_of(".".join(place[1:]))
    assert written and written.is_file(), "every module is written in a notebook that exists"
    assert not {m for m in imported(tree, place[:-1]) if number(notebook_of(m)) > number(written)}
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
    assert not names & TOOLS, "the package runs without the tools it is written with"
    assert not contains(tree, ast.Global), "state belongs to objects, not to modules"


def test_no_global_random_state():
    "Every draw comes from a generator that was handed in; torch's own is seeded only where it is put back afterwards."
    banned = re.compile(r"\b(?:np|numpy)\.random\.(?:seed|rand|randn|randint|normal|uniform|choice|shuffle|permutation)\(|\btorch\.seed\(|^(?:import|from) random\b", re.M)
    for module in MODULES:
        text = module.read_text(encoding="utf-8")
        assert not banned.findall(text), name(module)
        forked = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.With) and "fork_rng" in ast.unparse(n.items[0])]
        assert text.count("torch.manual_seed(") == sum(ast.unparse(n).count("torch.manual_seed(") for n in forked), name(module)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_documents_point_to_what_exists(document):
    text = (ROOT/document).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:|#", t)]
    missing = [t for t in targets if not (ROOT/t.partition("#")[0]).exists()]
    assert not missing
    commands = re.findall(r"\bscripts/[\w-]+", text)
    assert not [c for c in commands if not (ROOT/c).exists() and not (ROOT/f"{c}.py").exists()]
