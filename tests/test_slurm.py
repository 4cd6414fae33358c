"Jobs on a real SLURM of two nodes, which scripts/slurm-local brings up: ranks, pre-emption, lost nodes, arrays, failures, studies. The first case of all is in test_run.py."
import json
import os
import re
import shutil
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import yaml
from cluster import ROOT, Cluster

from causal_meta.models.base import Posterior
from causal_meta.runners.attempts import read_record
from causal_meta.runners.checkpoints import load_checkpoint, state_digest
from causal_meta.runners.config import load_config
from causal_meta.runners.runs import create_run, read_lines

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


# ---- scripts/slurm-local itself

@pytest.fixture
def local():
    "scripts/slurm-local in a folder of its own, which is gone afterwards with all that ran in it."
    made = Cluster(Path("/run")/f"causal_meta-slurm-local-{os.getpid()}", 18000)
    yield made
    made("down")


def alive(pid):
    try: return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return False


def pids(folder): return {p.name: p.read_text().strip() for p in (folder/"run").glob("*.pid")}


def test_two_nodes_come_and_go(local):
    up = local("up")
    assert up.returncode == 0 and up.stdout == f"export SLURM_CONF={local.folder}/slurm.conf\n", up.stderr
    first = pids(local.folder)
    assert set(first) == {"munged.pid", "slurmctld.pid", "slurmd-n1.pid", "slurmd-n2.pid"}
    assert local("up").returncode == 0 and pids(local.folder) == first  # nothing is started twice
    ran = local("--nodes=2", "--ntasks-per-node=1", "bash", "-c", "echo $SLURMD_NODENAME $SLURM_PROCID/$SLURM_NTASKS", command="srun")
    assert sorted(ran.stdout.splitlines()) == ["n1 0/2", "n2 1/2"], ran.stderr
    assert local("node", "n2", "down").returncode == 0 and "slurmd-n2.pid" not in pids(local.folder)
    assert local("node", "n2", "up").returncode == 0 and pids(local.folder)["slurmd-n1.pid"] == first["slurmd-n1.pid"]
    assert local("down").returncode == 0 and not local.folder.exists()
    assert not [pid for pid in first.values() if alive(int(pid))]
    assert local("down").returncode == 0  # again: there is nothing to do


def test_a_folder_that_is_not_ours_is_left_alone(local):
    local.folder.mkdir()
    (local.folder/"precious").touch()
    done = local("down")
    assert done.returncode == 1 and "is not a folder of slurm-local" in done.stderr and (local.folder/"precious").exists()
    shutil.rmtree(local.folder)


def test_words_that_mean_nothing(local):
    done = local("sideways")
    assert done.returncode == 2 and done.stderr.startswith("usage: scripts/slurm-local up|down")


# ---- ranks

TINY = {"name": "tiny", "benchmark": "smoke-v1", "models": {"avici": {"type": "avici", "config": {"size": "tiny"}}},
        "pre_training": {"steps": 240, "global_batch": 16, "validate_every": 80, "checkpoint_every": 40, "log_every": 1, "threads": 1}}
LAYOUTS = {"1x1": (), "2x1": ("--nodes=2", "--ntasks-per-node=1"), "1x2": ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1")}


@pytest.mark.parametrize("model", ["avici", "bcnp", "pairformer"])
def test_ranks_on_one_node_and_on_two(cluster, tmp_path, model):
    "The same tasks, the same first gradient, the same curve as one rank alone."
    script = tmp_path/"member.py"
    script.write_text(textwrap.dedent(f"""
        import json, sys
        from pathlib import Path
        from test_elastic import gradient_of_first_step, train_a_while
        from causal_meta.runners.distributed import rank_of
        from causal_meta.runners.runs import RunDir
        layout, rank, here = sys.argv[1], rank_of(), Path({str(tmp_path)!r})
        found = gradient_of_first_step(rank, {model!r})
        if rank.is_main: (here/f"{{layout}}.json").write_text(json.dumps(found))
        train_a_while(rank, RunDir(here/layout), {model!r}, None, here/f"{{layout}}-notes")
        """))
    settings = {**TINY, "models": {model: {"type": model, "config": {"size": "tiny"}}}, "pre_training": {**TINY["pre_training"], "steps": 12, "validate_every": 6, "learning_rate": .003}}
    jobs = {}
    for layout, options in LAYOUTS.items():
        create_run(load_config(settings, name=layout), tmp_path)
        (tmp_path/f"{layout}-notes").mkdir()
        (tmp_path/f"{layout}.sh").write_text(f"#!/bin/bash\nset -euo pipefail\njobs={ROOT}/slurm\nsource $jobs/job.sh\nPYTHONPATH={ROOT}/tests srun $python {script} {layout}\n")
        jobs[layout] = cluster.sbatch("--cpus-per-task=1", *options, f"--output={tmp_path}/{layout}.out", tmp_path/f"{layout}.sh")
    for layout, job in jobs.items(): assert cluster.finish(job, tmp_path/f"{layout}.out")["JobState"] == "COMPLETED", (tmp_path/f"{layout}.out").read_text()

    def keys(layout):
        steps = {}
        for file in (tmp_path/f"{layout}-notes").iterdir():
            for line in file.read_text().splitlines():
                step, seen = json.loads(line)
                steps[step] = steps.get(step, []) + [tuple(k) for k in seen]
        return {step: sorted(seen) for step, seen in steps.items()}
    loss, whole = json.loads((tmp_path/"1x1.json").read_text())
    curve = [line["loss"] for line in read_lines(tmp_path/"1x1"/"logs"/f"pre_training-{model}.jsonl")]
    largest = max(abs(x) for g in whole if g for x in g)
    assert len(keys("1x1")) == len(curve) == 12
    for layout in ("2x1", "1x2"):
        assert len(list((tmp_path/f"{layout}-notes").iterdir())) == 2 and keys(layout) == keys("1x1")
        other, grads = json.loads((tmp_path/f"{layout}.json").read_text())
        assert abs(other - loss) < 1e-6*abs(loss)
        for a, b in zip(grads, whole): assert (a is None) == (b is None) and (a is None or max(abs(x - y) for x, y in zip(a, b)) < 1e-6*largest)
        losses = [line["loss"] for line in read_lines(tmp_path/layout/"logs"/f"pre_training-{model}.jsonl")]
        assert len(losses) == 12 and max(abs(x - y)/abs(y) for x, y in zip(losses, curve)) < 1e-3


# ---- being stopped

class PreTraining:
    "A pre-training on two nodes, or with other options of sbatch."

    def __init__(self, cluster, folder, name, *options):
        self.cluster, self.run, self.log = cluster, create_run(load_config(TINY, name=name), folder), folder/f"{name}.out"
        options = options or ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2")
        self.job = cluster.sbatch(*options, f"--output={self.log}", "slurm/pre_training.sbatch", self.run.path)

    def step(self) -> int: return (read_lines(self.run.log("pre_training", "avici")) or [{"step": 0}])[-1]["step"]
    def reaches(self, step: int) -> None: self.cluster.wait(lambda: self.step() >= step, self.job, self.log)
    def goes_back(self) -> None:
        "Wait until SLURM has taken it off its nodes."
        self.cluster.wait(lambda: self.cluster.show(self.job)["Restarts"] != "0" or self.cluster.show(self.job)["JobState"] not in ("RUNNING", "COMPLETING"), self.job, self.log)
    def finish(self) -> dict[str, str]:
        end = self.cluster.finish(self.job, self.log)
        assert end["JobState"] == "COMPLETED" and read_record(self.run, "pre_training")["state"] == "done", self.log.read_text()
        return end

    def weights(self) -> list[str]:
        states = [load_checkpoint(self.run.checkpoints("avici")/f"{name}.pt") for name in ("best", "last")]
        return [state_digest({k: state[k] for k in ("model_state_dict", "step")}) for state in states]

    def attempts(self) -> list[str]: return sorted(p.name for p in (self.run.path/"notebooks"/"attempts").iterdir())


@pytest.fixture(scope="session")
def undisturbed(cluster, tmp_path_factory):
    "Weights of a training on two nodes that nobody disturbs."
    alone = PreTraining(cluster, tmp_path_factory.mktemp("undisturbed"), "undisturbed")
    assert alone.finish()["Restarts"] == "0" and alone.attempts() == ["pre_training-001.ipynb"]
    return alone.weights()


def was_stopped(training: PreTraining, undisturbed: list[str]) -> None:
    "It went back into the queue, went on, and ended as if nothing had happened; both attempts are kept."
    assert int(training.finish()["Restarts"]) >= 1
    assert training.weights() == undisturbed
    kept = training.attempts()
    assert len(kept) >= 2 and re.fullmatch(r"pre_training-\d+\.ipynb", kept[-1]) and not re.fullmatch(r"pre_training-\d+\.ipynb", kept[0])
    assert (training.run.path/"notebooks"/"pre_training.ipynb").read_bytes() == (training.run.path/"notebooks"/"attempts"/kept[-1]).read_bytes()
    assert "resuming from last.pt at step" in training.log.read_text()
    assert [line["step"] for line in read_lines(training.run.log("pre_training", "avici"))] == list(range(1, 241))


def test_pre_emption(cluster, tmp_path, undisturbed):
    training = PreTraining(cluster, tmp_path, "urgent")
    behind = cluster.sbatch(f"--dependency=afterok:{training.job}", "--kill-on-invalid-dep=yes", f"--output={tmp_path}/behind.out", "--wrap=true")
    training.reaches(20)
    other = cluster.sbatch("--partition=urgent", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", f"--output={tmp_path}/other.out", "--wrap=true")
    training.goes_back()
    assert cluster.finish(other, tmp_path/"other.out")["JobState"] == "COMPLETED"
    was_stopped(training, undisturbed)
    assert cluster.finish(behind, tmp_path/"behind.out")["JobState"] == "COMPLETED"  # it waited for the second start
    assert training.attempts() == ["pre_training-001.stopped.ipynb", "pre_training-002.ipynb"] and "going back into the queue" in training.log.read_text()


def test_scancel_with_a_signal(cluster, tmp_path, undisturbed):
    training = PreTraining(cluster, tmp_path, "signalled")
    training.reaches(20)
    assert cluster("--signal=USR1", "--full", training.job, command="scancel").returncode == 0
    training.goes_back()
    was_stopped(training, undisturbed)


def kernels(job: str) -> list[psutil.Process]:
    "The processes that do the work of a job."
    found = []
    for process in psutil.process_iter():
        try: ours = "ipykernel_launcher" in process.cmdline() and process.environ().get("SLURM_JOB_ID") == job
        except psutil.Error: continue
        if ours: found.append(process)
    return found


def test_the_time_limit(cluster, tmp_path, undisturbed):
    "SLURM sends USR1 some time before the end. Until it does, the training is held, for it would be done before."
    training = PreTraining(cluster, tmp_path, "limited", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--time=2", "--signal=USR1@30")
    training.reaches(20)
    assert len(held := kernels(training.job)) == 2
    for process in held: process.suspend()
    asked = training.run.path/"stages"/f".asked-{training.job}"
    cluster.wait(asked.exists, training.job, training.log)
    for process in held: process.resume()
    training.goes_back()
    assert cluster("update", f"JobId={training.job}", "TimeLimit=60", command="scontrol").returncode == 0
    was_stopped(training, undisturbed)


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_is_lost(cluster, tmp_path, undisturbed, node):
    "With it goes rank 0, and the shell of the job, or rank 1. The rest of the job is ended by SLURM, which starts it again on nodes that are there."
    training = PreTraining(cluster, tmp_path, f"without-{node}")
    training.reaches(60)
    cluster("node", node, "down")
    training.goes_back()
    cluster("node", node, "up")
    assert int(training.finish()["Restarts"]) >= 1
    assert training.weights() == undisturbed


def test_a_node_that_is_lost_but_works_on(cluster, tmp_path):
    "Only SLURM has lost it: the job starts elsewhere, and waits until what is left of it there has come to an end."
    alone = PreTraining(cluster, tmp_path, "alone", "--nodes=1", "--nodelist=n2")
    alone.finish()
    training = PreTraining(cluster, tmp_path, "orphan", "--nodes=1")
    training.reaches(20)
    node = cluster.show(training.job)["NodeList"]
    cluster("node", node, "down")
    try:
        training.goes_back()
        assert int(training.finish()["Restarts"]) >= 1
    finally: cluster("node", node, "up")
    assert training.weights() == alone.weights()
    assert [line["step"] for line in read_lines(training.run.log("pre_training", "avici"))] == list(range(1, 241))  # nothing was written twice


# ---- arrays

def test_an_array_of_which_one_task_is_killed(cluster, tmp_path):
    run = create_run(load_config({"name": "array", "benchmark": "smoke-v1", "models": {"mcmc": {"type": "mcmc"}, "exact": {"type": "exact"}}}), tmp_path)
    send = ("--array=0-3%2", f"--output={tmp_path}/%x_%A_%a.out", "slurm/inference.sbatch", run.path, 4)
    first = cluster.sbatch(*send)
    there = lambda: sorted((run.path/"inference").rglob("*.safetensors"))
    begun = lambda k: (read_record(run, f"inference-{k}of4") or {}).get("state")
    cluster.wait(lambda: begun(1) == "running" and there(), first)
    psutil.Process(read_record(run, "inference-1of4")["pid"]).send_signal(signal.SIGKILL)  # no more than a part of its work is done
    for k in range(4): cluster.finish(f"{first}_{k}", tmp_path/f"inference_{first}_{k}.out")
    states = [cluster.show(f"{first}_{k}")["JobState"] for k in range(4)]
    assert states == ["COMPLETED", "FAILED", "COMPLETED", "COMPLETED"]
    before = {p: p.stat().st_mtime_ns for p in there()}
    for path in before: Posterior.load(path)  # none is torn
    assert 9 <= len(before) < 12
    second = cluster.sbatch(*send)
    for k in range(4): assert cluster.finish(f"{second}_{k}", tmp_path/f"inference_{second}_{k}.out")["JobState"] == "COMPLETED"
    assert len(there()) == 12 and {p: p.stat().st_mtime_ns for p in before} == before
    counts = read_lines(run.path/"logs"/"inference.jsonl")[-4:]
    assert {c["shard"] for c in counts} == {f"{k}/4" for k in range(4)}
    assert (sum(c["computed"] for c in counts), sum(c["kept"] for c in counts)) == (12 - len(before), len(before))
    for path in there(): Posterior.load(path)


def test_a_failing_stage_cancels_those_behind_it(cluster, tmp_path):
    settings = ["--set", "pre_training.steps=2", "--set", "pre_training.validate_every=2", "--set", "models={exact: {type: exact}, random: {type: random}}", "--set", "tasks=1"]
    spoilt = tmp_path/"experiments"/"smoke_test"/"inference"/"random"/"id"/"neural_net_er"/"0.safetensors"
    spoilt.mkdir(parents=True)  # a posterior can't be written here
    (spoilt/"full").touch()
    done = cluster("smoke_test", *settings, "--jobs", 2, "--wait", "--experiments", tmp_path/"experiments", command=ROOT/"slurm/submit")
    assert done.returncode == 1, done.stderr
    told = cluster("-m", "causal_meta", "status", "smoke_test", "--experiments", tmp_path/"experiments", command=cluster.env["CAUSAL_META_PYTHON"])
    assert told.returncode == 1
    for text in (done.stdout, told.stdout):
        rows = {tuple(re.split(r"  +", line)[:2]): re.split(r"  +", line)[3] for line in text.splitlines() if re.match(r"(pre_training|inference|evaluation|report) .*_\d", line)}
        assert rows["evaluation", "smoke_test"] == rows["report", "smoke_test"] == "cancelled" and rows["pre_training", "smoke_test"] == "done"
        assert sorted([rows["inference", "part 0 of 2"], rows["inference", "part 1 of 2"]]) == ["done", "failed"]
        assert re.search(r"inference, part \d of 2, job \d+_\d: failed\. .*neural_net_er/0\.safetensors", text), text
        assert re.search(r"    causal-meta: .*neural_net_er/0\.safetensors", text.split("the last lines of")[1])
    shutil.rmtree(spoilt)
    again = cluster("smoke_test", *settings, "--jobs", 2, "--wait", "--experiments", tmp_path/"experiments", command=ROOT/"slurm/submit")
    assert again.returncode == 0 and "results  " in again.stdout, again.stdout
    told = cluster("-m", "causal_meta", "status", "smoke_test", "--experiments", tmp_path/"experiments", command=cluster.env["CAUSAL_META_PYTHON"])
    assert told.returncode == 0 and told.stdout.count("done") == 5


def test_a_study_is_an_array(cluster, tmp_path, monkeypatch):
    from test_study import STUDY
    (tmp_path/"study.yaml").write_text(yaml.safe_dump(yaml.safe_load(STUDY)))
    words = (tmp_path/"study.yaml", "--jobs", 2, "--experiments", tmp_path/"experiments")
    monkeypatch.setitem(cluster.env, "MODELS_APART", "yes")
    sent = cluster(*words, command=ROOT/"slurm/submit")
    assert sent.returncode == 0 and "how it goes: causal-meta status study --experiments" in sent.stdout, sent.stderr
    busy = cluster(*words, command=ROOT/"slurm/submit")
    assert busy.returncode == 2 and "'study' has jobs in the queue" in busy.stderr
    job = re.search(r"report +job (\d+)", sent.stdout)[1]
    for k in range(3): assert cluster.finish(f"{job}_{k}", tmp_path/"experiments"/"slurm"/f"study-report_{job}_{k}.out")["JobState"] == "COMPLETED"
    for seed, computed in ((0, 6), (1, 0)):  # explicit posteriors were computed once
        run = tmp_path/"experiments"/f"study-{seed}"
        assert sum(c["computed"] for c in read_lines(run/"logs"/"inference.jsonl")) == computed
        assert {f"{s}.ipynb" for s in ("pre_training", "inference", "evaluation", "report")} <= {p.name for p in (run/"notebooks").iterdir()}
    text = (tmp_path/"experiments"/"study-report.ipynb").read_text()
    assert "training seeds 0 and 1" in text
    told = cluster("-m", "causal_meta", "status", "study", "--experiments", tmp_path/"experiments", command=cluster.env["CAUSAL_META_PYTHON"])
    assert told.returncode == 0 and told.stdout.count(" done ") == 4 + 2 + 2 + 3, told.stdout
    made = subprocess.run([cluster.env["CAUSAL_META_PYTHON"], "-m", "causal_meta", "aggregate", "experiments/study-0", "experiments/study-1", "--out", "out"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0 and "2 runs, " in made.stdout, made.stderr


def test_a_part_that_there_is_not(cluster, tmp_path):
    job = cluster.sbatch("--array=5", f"--output={tmp_path}/%x_%A_%a.out", "slurm/inference.sbatch", tmp_path, 4)
    assert cluster.finish(f"{job}_5", tmp_path/f"inference_{job}_5.out")["JobState"] == "FAILED"
    time.sleep(.2)
    assert "task 5 of the array has no part of 4: say --array=0-3" in (tmp_path/f"inference_{job}_5.out").read_text()
