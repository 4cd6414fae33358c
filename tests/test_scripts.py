"The commands that a person, CI or a cluster types: they parse, are executable, and do not depend on where they are called."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from causal_meta.runners.config import load_config
from causal_meta.runners.pre_training import pre_train
from causal_meta.runners.runs import create_run

ROOT = Path(__file__).parents[1]
BASH = sorted(p for folder in ("scripts", "slurm", ".ci") for p in (ROOT/folder).iterdir()
              if p.is_file() and (p.suffix in (".sh", ".sbatch") or p.read_bytes().startswith(b"#!/usr/bin/env bash")))
COMMANDS = [p for p in BASH if p.suffix != ".sh"]


def relative(path: Path) -> str: return path.relative_to(ROOT).as_posix()


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, **kwargs)


@pytest.mark.parametrize("script", BASH, ids=relative)
def test_it_is_bash(script):
    done = run("bash", "-n", script)
    assert done.returncode == 0, done.stderr
    text = script.read_text(encoding="utf-8")
    assert script.suffix == ".sh" or "set -euo pipefail" in text
    assert "MPLBACKEND=agg" not in text


@pytest.mark.parametrize("script", COMMANDS, ids=relative)
def test_it_is_executable(script):
    assert script.suffix == ".sbatch" or os.access(script, os.X_OK)


def test_setup_again_does_nothing_from_any_folder(tmp_path):
    if not (ROOT/".venv/causal_meta.stamp").exists(): pytest.skip("the environment was not made by scripts/setup")
    assert run(ROOT/"scripts/setup").returncode == 0  # where the tests were started without it, it may have something to do
    before = (ROOT/".venv/setup.log").stat().st_mtime_ns
    done = run(ROOT/"scripts/setup", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (ROOT/".venv/setup.log").stat().st_mtime_ns == before  # pip was not called
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tree(tmp_path):
    "A copy of what scripts/setup reads, with stand-ins on the path."
    folder = tmp_path/"tree"
    (folder/"scripts").mkdir(parents=True)
    for name in ("settings.ini", "setup.py", "pyproject.toml", "scripts/setup"): shutil.copy(ROOT/name, folder/name)
    return folder


def test_setup_refuses_in_one_sentence(tree, tmp_path):
    done = run(tree/"scripts/setup", env={**os.environ, "PYTHON": "no_such_python"})
    assert done.returncode == 1 and "there is no 'no_such_python'" in done.stderr
    old = tmp_path/"old_python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.8.1\nexit 1\n')
    old.chmod(0o755)
    done = run(tree/"scripts/setup", env={**os.environ, "PYTHON": str(old)})
    assert done.returncode == 1 and "'Python 3.8.1'" not in done.stderr and "needs Python 3.11 or newer" in done.stderr
    assert not (tree/".venv").exists()


@pytest.mark.parametrize("script", ["test", "prepare"])
def test_unknown_options_are_refused(script):
    done = run(ROOT/"scripts"/script, "--al")
    assert done.returncode == 2 and "usage" in done.stderr


@pytest.mark.parametrize("benchmark, part", [pytest.param("exact5-v1", "curves", marks=pytest.mark.slow), pytest.param("pairs-v1", "results", marks=pytest.mark.slow)])
def test_curves_of_a_run(tmp_path, benchmark, part):
    made = {}
    for name in ("main", "other"):
        settings = {"name": name, "benchmark": benchmark, "models": {"avici": {"type": "avici", "config": {"size": "tiny"}}},
                    "pre_training": {"steps": 2, "global_batch": 4, "rows": 16, "keep_every": 1, "validate_every": 2, "log_every": 1, "threads": 1}}
        pre_train(made.setdefault(name, create_run(load_config(settings), tmp_path)), "avici")
    done = run(sys.executable, ROOT/"scripts/curves.py", made["main"].path, "--beside", made["other"].path, "--out", tmp_path/"new/found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path/"new/found.json").read_text())
    assert found["benchmark"] == benchmark and found[part] and found["models"]["avici"]["tasks_seen"] == 8
    assert [line["step"] for line in found["beside"]["other"]["avici"]["losses"] if "val_loss" in line] == [2]
    if part == "curves": assert [(row["step"], row["family"]) for row in found["curves"]] == [(s, f) for s in (1, 2) for f in ("id/n100", "id/n500")]


@pytest.fixture
def cluster(tmp_path):
    "An sbatch job's world: stand-ins for srun and scontrol that write down how they were called."
    (tmp_path/"bin").mkdir()
    (tmp_path/"tree/scripts").mkdir(parents=True)
    (tmp_path/"tree/slurm").mkdir()
    (tmp_path/"tree/settings.ini").touch()
    (tmp_path/"tree/scripts/common.sh").write_text('cd "$(dirname "${BASH_SOURCE[0]}")/.."\n')
    for name, code in (("srun", 'echo "ranks meet at $MASTER_ADDR:$MASTER_PORT"; exit ${SRUN_CODE:-0}'), ("scontrol", "exit 1")):
        (tmp_path/"bin"/name).write_text(f'#!/bin/sh\nif [ "$1" = show ]; then echo localhost; exit; fi\necho "{name} $*" >> "$CALLS"\n{code}\n')
        (tmp_path/"bin"/name).chmod(0o755)

    def job(script: str, *words, **env):
        calls = tmp_path/"calls"
        calls.unlink(missing_ok=True)
        done = run("bash", ROOT/"slurm"/script, *words, env={**os.environ, "PATH": f"{tmp_path/'bin'}:{os.environ['PATH']}", "CALLS": str(calls),
                                                            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_SUBMIT_DIR": str(tmp_path/"tree"), **env})
        return done, calls.read_text().splitlines() if calls.exists() else []
    job.tree = tmp_path/"tree"
    return job


def test_a_pre_training_job(cluster):
    done, calls = cluster("pre_training.sbatch", "my_run")
    assert done.returncode == 0 and calls == ["srun --kill-on-bad-exit=1 causal-meta pretrain my_run"], done.stderr
    assert "ranks meet at localhost:20007" in done.stdout
    done, calls = cluster("pre_training.sbatch")
    assert done.returncode != 0 and "usage" in done.stderr and calls == []


def test_a_pre_training_job_that_was_stopped_goes_back_into_the_queue(cluster):
    done, calls = cluster("pre_training.sbatch", "my_run", SRUN_CODE="85")
    assert done.returncode == 85 and calls[1:] == ["scontrol requeue 7"]  # even though scontrol refused, as it may
    done, calls = cluster("pre_training.sbatch", "my_run", SRUN_CODE="1")
    assert done.returncode == 1 and len(calls) == 1


def test_a_job_reads_what_is_true_of_its_site(cluster):
    (cluster.tree/"slurm/site.env").write_text('SITE_PROLOGUE="echo loaded a module"\n')
    done, _ = cluster("pre_training.sbatch", "my_run")
    assert "loaded a module" in done.stdout


def test_job_files_name_no_site():
    for script in (ROOT/"slurm").iterdir():
        for word in ("--partition", "--account", "--gres", "--gpus", "--nodelist", "--mail"):
            assert f"#SBATCH {word}" not in script.read_text(), f"{relative(script)}: {word} belongs into slurm/site.env"
