"What the tests share."
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cli(tmp_path):
    "Run `causal-meta` in an empty folder; gives back the finished process."
    def call(*words, cwd=tmp_path, **env):
        return subprocess.run([sys.executable, "-m", "causal_meta", *map(str, words)], cwd=cwd, capture_output=True, text=True,
                              env={**os.environ, **env}, timeout=600)
    return call


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    "Run the command line in this process (to start one costs seconds), expecting exit code 2, one sentence, and nothing left behind; gives back the sentence."
    from causal_meta.cli import main

    def call(*words):
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["causal-meta", *map(str, words)])
        capsys.readouterr()  # what the test itself printed
        with pytest.raises(SystemExit) as left: main()
        printed, said = capsys.readouterr()
        assert left.value.code == 2, (left.value.code, printed, said)
        assert said.startswith("causal-meta: ") and len(said.strip().splitlines()) == 1, said
        assert printed == ""
        assert sorted(tmp_path.rglob("*")) == before
        return said
    return call


@pytest.fixture(scope="session")
def sachs_folder():
    "The folder of real data, or a skip that says why."
    folder = os.environ.get("CAUSAL_META_DATA")
    if not folder: pytest.skip("real data: CAUSAL_META_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def cluster(request):
    "A SLURM of two nodes. Where slow tests are left out a machine may be unfit for it; with them it has to come up."
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    made = Cluster(Path("/run")/f"causal_meta-slurm-{os.getpid()}", 17000 + 10*worker)
    yield made.up(may_fail="not slow" in request.config.option.markexpr)
    made("down")
