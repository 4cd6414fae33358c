"What the tests share."
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cli(tmp_path):
    "Run `causal-meta` in an empty folder; gives back the finished process."
    def call(*words, cwd=tmp_path, **env):
        return subprocess.run([sys.executable, "-m", "causal_meta", *map(str, words)], cwd=cwd, capture_output=True, text=True,
                              env={**os.environ, **env}, timeout=600)
    return call


@pytest.fixture
def refused(cli, tmp_path):
    "Run `causal-meta`, expecting exit code 2, one sentence, and nothing left behind; gives back the sentence."
    def call(*words):
        before = sorted(tmp_path.rglob("*"))
        done = cli(*words)
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert done.stderr.startswith("causal-meta: ") and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert done.stdout == ""
        assert sorted(tmp_path.rglob("*")) == before
        return done.stderr
    return call


@pytest.fixture(scope="session")
def sachs_folder():
    "The folder of real data, or a skip that says why."
    folder = os.environ.get("CAUSAL_META_DATA")
    if not folder: pytest.skip("real data: CAUSAL_META_DATA is not set")
    return Path(folder)
