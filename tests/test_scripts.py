"The commands that a person, CI or a cluster types: they parse, are executable, and do not depend on where they are called."
import json
import os
import re
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


def test_a_bench_that_needs_a_device_says_so():
    import torch
    if torch.cuda.is_available(): pytest.skip("there is a CUDA device here")
    done = run(sys.executable, ROOT/"scripts/bench_gpu.py")
    assert done.returncode == 2 and done.stderr.strip() == "scripts/bench gpu: this machine has no CUDA device, or its torch is built without CUDA."


@pytest.fixture
def job(tmp_path):
    "A job file with stand-ins for srun, scontrol and the interpreter, which write down how they were called."
    tree, calls = tmp_path/"tree", tmp_path/"calls"
    shutil.copytree(ROOT/"slurm", tree/"slurm", ignore=lambda *_: ["site.env"])
    (tmp_path/"bin").mkdir()
    stand_ins = {"python": "exit 0", "scontrol": '[ "$1" = requeue ] && { echo "scontrol $*" >> "$CALLS"; exit ${REFUSES:-0}; }\n[ "$1" = -o ] && echo "JobState=${STATE:-RUNNING} Restarts=${RESTARTS:-0}" || echo localhost',
                 "srun": f'echo "srun $*" >> "$CALLS"\necho "ranks meet at ${{MASTER_ADDR:-nowhere}}:${{MASTER_PORT:-}}"\n[ -z "$HEARS" ] || touch "$CAUSAL_META_ASKED"\n{sys.executable} -c "$SRUN"'}
    for name, code in stand_ins.items():
        (tmp_path/"bin"/name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path/"bin"/name).chmod(0o755)

    def call(script: str, *words, does="", **env):
        "Run a job file, where srun does what some Python says."
        calls.unlink(missing_ok=True)
        (tree/"run"/"stages").mkdir(parents=True, exist_ok=True)
        (tree/"run"/"config.yaml").touch()
        env = {"PATH": f"{tmp_path/'bin'}:/usr/bin:/bin", "CALLS": str(calls), "SRUN": does, "HEARS": "", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]",
               "SLURM_SUBMIT_DIR": str(tree), "CAUSAL_META_PYTHON": "python", **env}
        done = subprocess.run(["bash", str(tree/"slurm"/script), *words], capture_output=True, text=True, env=env, cwd=tmp_path)
        return done, calls.read_text().replace("--kill-on-bad-exit=1 ", "").replace("python -m causal_meta ", "").splitlines() if calls.exists() else []
    call.tree = tree
    return call


def record(name="pre_training", state="done", job="7") -> str:
    "Python that leaves a stage's record as the program does."
    return f"import json; json.dump(dict(state='{state}', job='{job}'), open('run/stages/{name}.json', 'w'), indent=1)"


def test_a_job_is_done_when_its_record_says_so(job):
    done, calls = job("pre_training.sbatch", "run", does=record())
    assert done.returncode == 0 and calls == ["srun pretrain run"], (done.stdout, done.stderr)
    for does in ("", record(state="running"), record(job="8")):  # it ends well, and has not done its work; or somebody else's has been done
        (job.tree/"run/stages/pre_training.json").unlink(missing_ok=True)
        done, calls = job("pre_training.sbatch", "run", does=does)
        assert done.returncode == 1 and "failed with code 0; run/stages/pre_training.json says how it stands" in done.stdout and len(calls) == 1
    done, calls = job("pre_training.sbatch")
    assert done.returncode == 2 and "usage: sbatch" in done.stderr and calls == []


@pytest.mark.parametrize("does, hears", [("exit(85)", ""), ("exit(138)", ""), ("exit(143)", ""), ("exit(137)", "yes"), ("exit(1)", "yes"), ("", "yes")])
def test_a_job_that_was_stopped_goes_back(job, does, hears):
    "Whatever code it leaves with, if a rank has heard the signal."
    done, calls = job("pre_training.sbatch", "run", does=does, HEARS=hears)
    assert done.returncode == 85 and calls[1:] == ["scontrol requeue 7"] and not list((job.tree/"run/stages").iterdir())


def test_a_task_of_an_array_goes_back_alone(job):
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    assert job("pre_training.sbatch", "one", "run", does="exit(85)", **array)[1] == ["srun pretrain run", "scontrol requeue 7_1"]


def test_networks_apart(job):
    third = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert job("pre_training.sbatch", "one", "run", "--", "avici", "bcnp", does=record("pre_training-bcnp", job="7_3"), **third)[1] == ["srun pretrain run --model bcnp"]
    all_of_it = "; ".join([record("pre_training"), record("evaluation")])
    assert job("evaluation.sbatch", "run", does=all_of_it, CAUSAL_META_PARTS="1", CAUSAL_META_APART="yes")[1] == ["srun --nodes=1 --ntasks=1 pretrain run", "srun evaluate run"]
    assert "usage: sbatch" in job("pre_training.sbatch", "one", "--", "avici", **third)[0].stderr


def test_a_job_does_not_go_back(job):
    for does in ("exit(1)", "exit(137)"):  # a mistake, or no memory left
        done, calls = job("pre_training.sbatch", "run", does=does)
        assert done.returncode == int(does[5:-1]) and len(calls) == 1
    done, calls = job("pre_training.sbatch", "run", does="exit(85)", SLURM_RESTART_COUNT="100", RESTARTS="100")
    assert done.returncode == 85 and len(calls) == 1 and "giving up" in done.stdout
    done, calls = job("pre_training.sbatch", "run", does="exit(85)", RESTARTS="1")  # what is left of it on a node that was lost
    assert done.returncode == 85 and len(calls) == 1 and "has been started anew already" in done.stdout
    done, calls = job("pre_training.sbatch", "run", does="exit(85)", REFUSES="1", STATE="PENDING")
    assert done.returncode == 85 and calls[1:] == ["scontrol requeue 7"] and "could not" not in done.stdout  # SLURM had put it back already


def test_a_restarted_job_whose_work_is_done(job):
    job("pre_training.sbatch", "run", does=record())
    done, calls = job("pre_training.sbatch", "run", SLURM_RESTART_COUNT="1")
    assert done.returncode == 0 and calls == [] and "is done" in done.stdout
    assert job("pre_training.sbatch", "run", does=record())[1] == ["srun pretrain run"]  # sent again, it looks again


def test_ranks_meet(job):
    meet = lambda **env: re.search("ranks meet at (.*)", job("pre_training.sbatch", "run", does=record(), **env)[0].stdout)[1]
    assert meet(SLURM_NTASKS="2") == "localhost:10007" and meet(SLURM_NTASKS="1") == "nowhere:"
    assert meet(SLURM_NTASKS="2", SLURM_RESTART_COUNT="1", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="0") == "localhost:17926"  # another port after a restart


def test_parts_of_the_inference(job):
    part = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert job("inference.sbatch", "run", "4", does=record("inference-2of4", job="7_2"), **part)[1] == ["srun infer run --shard 2/4"]
    assert job("inference.sbatch", "run", does=record("inference-2of3", job="7_2"), SLURM_ARRAY_TASK_COUNT="3", **part)[1] == ["srun infer run --shard 2/3"]
    assert job("inference.sbatch", "run", does=record("inference"))[1] == ["srun infer run"]
    assert "task 2 of the array has no part of 2: say --array=0-1" in job("inference.sbatch", "run", "2", **part)[0].stderr
    assert "usage: sbatch" in job("inference.sbatch")[0].stderr


def test_evaluation_and_report_of_several_runs(job):
    both = "; ".join([record("inference", job="7_1"), record("evaluation", job="7_1")])
    second = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    assert job("evaluation.sbatch", "one", "run", does=both, **second)[1] == ["srun --nodes=1 --ntasks=1 infer run --posteriors-of one", "srun evaluate run"]
    both = both.replace("7_1", "7")
    assert job("evaluation.sbatch", "run", does=both)[1] == ["srun --nodes=1 --ntasks=1 infer run", "srun evaluate run"]
    assert job("evaluation.sbatch", "run", does=both, CAUSAL_META_PARTS="1")[1] == ["srun evaluate run"]
    assert job("report.sbatch", "one", "run", does=record("report", job="7_1"), **second)[1] == ["srun report run"]
    last = {**second, "SLURM_ARRAY_TASK_ID": "2", "CAUSAL_META_REPORT": "all.ipynb"}
    assert job("report.sbatch", "run", "two", does=record("report_together-all", job="7_2"), **last)[1] == ["srun report run two --out all.ipynb"]
    assert "usage: sbatch" in job("report.sbatch", "run", **second)[0].stderr


def test_a_job_reads_what_is_true_of_its_site(job):
    (job.tree/"slurm/site.env").write_text('SITE_PROLOGUE=\'echo loaded a module; echo $NOTHING_OF_THE_KIND\'\n')
    assert "loaded a module" in job("pre_training.sbatch", "run", does=record())[0].stdout
    assert "there is no run in 'nothing'" in (job("pre_training.sbatch", "nothing")[0].stderr) and not (job.tree/"nothing").exists()
    assert "loaded" not in job("pre_training.sbatch", "run", does=record(), CAUSAL_META_SENT="1")[0].stdout  # read when it was sent
    (job.tree/"slurm/job.sh").unlink()
    assert "send from the root of the checkout, or with slurm/submit" in job("pre_training.sbatch", "run")[0].stderr
    assert job("pre_training.sbatch", "run")[0].returncode == 2


def test_job_files_name_no_site():
    for script in (ROOT/"slurm").iterdir():
        for word in ("--partition", "--account", "--time", "--gres", "--gpus", "--mem", "--nodelist", "--mail"):
            assert f"#SBATCH {word}" not in script.read_text(), f"{relative(script)}: {word} belongs into slurm/site.env"
