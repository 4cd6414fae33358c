"A SLURM of two nodes for tests, and what one does with it."
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


class Cluster:
    "scripts/slurm-local in a folder of its own, with ports of its own."

    def __init__(self, folder: Path, port: int):
        if os.getuid() != 0: pytest.skip("a SLURM of one's own needs root")
        if not shutil.which("slurmctld") and not shutil.which("apt-get"): pytest.skip("there is no SLURM here, and no apt-get to install it")
        if not Path("/sys/fs/cgroup").is_dir(): pytest.skip("slurmd needs /sys/fs/cgroup")
        self.folder = folder
        self.env = {**os.environ, "SLURM_LOCAL": str(folder), "SLURM_LOCAL_PORT": str(port), "SLURM_CONF": str(folder/"slurm.conf"),
                    "CAUSAL_META_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def __call__(self, *words, command=ROOT/"scripts/slurm-local", **options) -> subprocess.CompletedProcess:
        "Run scripts/slurm-local, or another command where its jobs are."
        return subprocess.run([str(command), *map(str, words)], capture_output=True, text=True, env=self.env, **{"timeout": 600, **options})

    def up(self, may_fail: bool = False) -> "Cluster":
        "Bring it up; where that may fail, or its packages can't be had, the test is skipped and says why."
        done = self("up")
        if done.returncode and (may_fail or "could not install" in done.stderr): pytest.skip(f"no SLURM could be brought up here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        return self

    def sbatch(self, *words) -> str:
        "Send a job from the root of the checkout; its id."
        done = self("--parsable", *words, command="sbatch", cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        "What SLURM says of a job or of a task of an array."
        done = self("-o", "show", "job", job, command="scontrol")
        return dict(re.findall(r"(\S+?)=(\S*)", done.stdout))

    def wait(self, until, job: str, log: Path | None = None, seconds: float = 240):
        "Wait for something to become true of a job."
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, (self.show(job), log.read_text()[-3000:] if log and log.exists() else "no log")
            time.sleep(.2)

    def finish(self, job: str, log: Path, seconds: float = 300) -> dict[str, str]:
        """Wait for a job's end. The two minutes that SLURM makes it wait after it went back are cut to five seconds: not to none, or the exit code
        of the shell that is still leaving is taken for that of the new one."""
        waits = 0.
        def over():
            nonlocal waits
            now = self.show(job)
            back = now["JobState"] == "PENDING" and now.get("Reason") == "BeginTime"
            waits = (waits or time.monotonic()) if back else 0.
            if back and time.monotonic() - waits > 5: self("update", f"JobId={job}", "StartTime=now", command="scontrol")
            return now["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED")
        self.wait(over, job, log, seconds)
        return self.show(job)
