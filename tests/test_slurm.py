"A real SLURM of two nodes on this machine: scripts/slurm-local brings it up and takes it away, and jobs run on it."
import os
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slurm


@pytest.fixture
def local():
    "Call scripts/slurm-local in a folder of its own, which is gone afterwards with all that ran in it."
    if os.getuid() != 0: pytest.skip("a SLURM of one's own needs root")
    if not shutil.which("slurmctld") and not shutil.which("apt-get"): pytest.skip("there is no SLURM here, and no apt-get to install it")
    folder = Path("/run")/f"causal_meta-slurm-{os.getpid()}"
    env = {**os.environ, "SLURM_LOCAL": str(folder), "SLURM_CONF": str(folder/"slurm.conf")}
    def call(*words, command=ROOT/"scripts/slurm-local"): return subprocess.run([command, *words], capture_output=True, text=True, env=env, timeout=300)
    call.folder = folder
    yield call
    call("down")


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
