"The wheel: it carries its data, needs nothing of the notebook tools, and works where only its requirements are installed."
import configparser
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ini = configparser.ConfigParser(delimiters=["="], interpolation=None)
ini.read(ROOT/"settings.ini", encoding="utf-8")
SETTINGS = ini["DEFAULT"]
TOOLS = {"nbdev", "fastcore", "execnb", "ghapi", "pytest", "hypothesis", "ruff", "smalldocs"}
IMPORT_ALL = """
import importlib, importlib.util, pkgutil, sys, causal_meta
names = [m.name for m in pkgutil.walk_packages(causal_meta.__path__, "causal_meta.") if "._" not in m.name]
for name in names: importlib.import_module(name)
tools = [t for t in sys.argv[1].split(",") if importlib.util.find_spec(t)]
assert not tools, f"not bare: {tools}"
print(causal_meta.__version__, causal_meta.__file__, *names)
"""


def run(*command, **kwargs) -> str:
    "The output of a command; if it fails, so does the test, with all it said."
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=900, **kwargs)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    "A copy of the files that git knows or would add."
    tree = tmp_path_factory.mktemp("tree")
    for name in run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines():
        if not (ROOT/name).is_file(): continue
        (tree/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, tree/name)
    return tree


@pytest.fixture(scope="session")
def wheel(tree, tmp_path_factory) -> Path:
    "The wheel, built from that copy."
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out, tree)
    return next(out.glob("*.whl"))


def closure(requirements: list[str], extra: str = "") -> set[str]:
    "The distributions that some requirements need, and those that these need, as installed here."
    found: set[str] = set()
    todo = [(Requirement(r), extra) for r in requirements]
    while todo:
        need, extra = todo.pop()
        if need.marker and not need.marker.evaluate({"extra": extra}): continue
        name = canonicalize_name(need.name)
        if name in found and not need.extras: continue
        found.add(name)
        needs = importlib.metadata.requires(name) or []
        todo += [(Requirement(r), e) for r in needs for e in ("", *need.extras)]
    return found


def link(names: set[str], to: Path) -> None:
    "Put links to the files of some distributions into a folder of packages."
    for name in names:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (to/top).exists(): (to/top).symlink_to(distribution.locate_file(top))


@pytest.fixture(scope="session")
def bare(wheel, tmp_path_factory) -> Path:
    "The bin folder of an environment with the wheel and exactly what it requires, linked from the environment of the tests."
    env = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", "--without-pip", env)
    site = Path(run(env/"bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    with zipfile.ZipFile(wheel) as z: metadata = z.read(next(n for n in z.namelist() if n.endswith("METADATA"))).decode()
    link(closure(re.findall(r"^Requires-Dist: (.*)$", metadata, re.M)), site)
    run(sys.executable, "-m", "pip", "--python", env/"bin/python", "install", "-q", "--no-deps", "--no-index", wheel)
    return env/"bin"


def test_the_wheel_carries_its_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (("configs", "*.yaml"), ("frozen", "*.json"), ("schemas", "*.json"), ("pretrained", "*.safetensors"), ("pretrained", "*.json")):
        wanted = {f"causal_meta/{folder}/{p.name}" for p in (ROOT/"causal_meta"/folder).glob(pattern)}
        assert wanted and wanted <= names
    jobs = {f"causal_meta/jobs/{p.name}" for p in (ROOT/"nbs/jobs").glob("*.ipynb")}
    jobs |= {f"causal_meta/jobs/slurm/{p.name}" for p in (ROOT/"slurm").iterdir() if p.suffix == ".sbatch" or p.name in ("job.sh", "site.env.example")}
    assert jobs and jobs == {n for n in names if n.startswith("causal_meta/jobs/")}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT/"causal_meta").rglob("*.py")}
    assert modules <= names
    assert not [n for n in names if not n.startswith("causal_meta")]


def test_shipped_weights_are_small(wheel):
    "Weights and cards together: at most 8 MiB, and each weights file has its card."
    inside = {i.filename: i.file_size for i in zipfile.ZipFile(wheel).infolist() if i.filename.startswith("causal_meta/pretrained/")}
    assert sum(inside.values()) <= 8*2**20
    weights = {n.removesuffix(".safetensors") for n in inside if n.endswith(".safetensors")}
    assert weights and weights == {n.removesuffix(".json") for n in inside if n.endswith(".json")}


def test_the_source_archive_is_complete(tree, wheel, tmp_path):
    "It holds every file of the wheel, and what setup.py reads to make one."
    pytest.importorskip("setuptools")
    run(sys.executable, "-c", "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])", tmp_path, cwd=tree)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive: names = {n.partition("/")[2] for n in archive.getnames()}
    data = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("causal_meta/")}
    assert {n for n in data if not n.startswith("causal_meta/jobs/")} <= names
    assert {n.replace("causal_meta/jobs/slurm/", "slurm/").replace("causal_meta/jobs/", "nbs/jobs/") for n in data if n.startswith("causal_meta/jobs/")} <= names
    assert {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_everything_imports_where_only_the_requirements_are(bare):
    version, where, *modules = run(bare/"python", "-I", "-c", IMPORT_ALL, ",".join(TOOLS)).split()
    assert version == SETTINGS["version"]
    assert str(ROOT) not in where and len(modules) > 10


def test_the_command_works_there(bare, tmp_path):
    assert "Usage: causal-meta" in run(bare/"causal-meta", "--help", cwd=tmp_path)
    shown = run(bare/"causal-meta", "run", "smoke_test", "--executor", "slurm", "--dry-run", cwd=tmp_path)
    assert "/causal_meta/jobs/slurm/pre_training.sbatch" in shown and "experiments/smoke_test)" in shown
    assert list(tmp_path.iterdir()) == []


def test_shipped_weights_answer_there(bare, tmp_path):
    "What the wheel carries does what its card says, where only its requirements are, in an empty folder."
    assert "the file is whole" in run(bare/"causal-meta", "pretrained", "verify", "pairformer-small", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_settings_ini_is_the_only_place_of_the_version():
    import causal_meta
    assert causal_meta.__version__ == SETTINGS["version"] == importlib.metadata.version("causal_meta")
    assert f'version: {SETTINGS["version"]}' in (ROOT/"CITATION.cff").read_text(encoding="utf-8")


def test_import_is_light():
    "`import causal_meta` brings neither torch nor a notebook tool."
    heavy = {"torch", "pandas", "matplotlib", "papermill", "IPython"} | TOOLS
    loaded = set(run(sys.executable, "-c", "import causal_meta, sys; print(*{m.split('.')[0] for m in sys.modules})").split())
    assert not loaded & heavy


@pytest.mark.slow
def test_installed_by_pip_it_runs_the_smoke_job(wheel, tmp_path):
    "As a user: a new environment, torch, the wheel with what it requires, and the smallest job in an empty folder."
    run(sys.executable, "-m", "venv", tmp_path/"env")
    run(tmp_path/"env/bin/pip", "install", "-q", SETTINGS["torch_default"])
    run(tmp_path/"env/bin/pip", "install", "-q", wheel)
    run(tmp_path/"env/bin/python", "-I", "-c", IMPORT_ALL, ",".join(TOOLS))
    (tmp_path/"here").mkdir()
    run(tmp_path/"env/bin/causal-meta", "run", "smoke_test", cwd=tmp_path/"here")
    assert (tmp_path/"here/experiments/smoke_test/results/metrics_summary.json").is_file()
