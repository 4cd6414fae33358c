"A killed pre-training goes on as if nothing had happened: a real process, a real `kill -9`."
import subprocess
import sys
import time

import psutil
import pytest

from causal_meta.runners.checkpoints import load_checkpoint, state_digest
from causal_meta.runners.config import load_config
from causal_meta.runners.pre_training import pre_train
from causal_meta.runners.runs import create_run, read_lines

SETTINGS = ["pre_training.steps=40", "pre_training.checkpoint_every=4", "pre_training.validate_every=8", "pre_training.log_every=1",
            "pre_training.threads=1"]


def kill_hard(process):
    "End a process and all it started, at once: SIGKILL cannot be caught."
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for p in family: p.kill()
    psutil.wait_procs(family[1:], timeout=10)
    process.wait()


@pytest.mark.parametrize("model", ["avici", "bcnp"])
def test_kill_9_then_the_same_command(tmp_path, model):
    only = {"name": "smoke_test", "benchmark": "smoke-v1", "models": {model: {"type": model, "config": {"size": "tiny"}}}}
    whole = create_run(load_config(only, SETTINGS, name="whole"), tmp_path)
    pre_train(whole, model)
    broken = create_run(load_config(only, SETTINGS, name="broken"), tmp_path)
    command = [sys.executable, "-m", "causal_meta", "pretrain", str(broken.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while len(read_lines(broken.log("pre_training", model))) < 15:
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(.02)
    kill_hard(process)
    reached = load_checkpoint(broken.checkpoints(model)/"last.pt")["step"]
    assert 0 < reached < 40
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert f"{model}: resuming from last.pt at step {reached}" in again.stdout
    for file in ("last.pt", "best.pt"):
        a, b = (load_checkpoint(r.checkpoints(model)/file) for r in (whole, broken))
        assert a["step"] == b["step"]
        assert state_digest(a["model_state_dict"]) == state_digest(b["model_state_dict"])
    a, b = (load_checkpoint(r.checkpoints(model)/"last.pt") for r in (whole, broken))
    for part in ("optimizer_state_dict", "scheduler_state_dict", "best"): assert state_digest(a[part]) == state_digest(b[part]), part
    logs = [[{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(r.log("pre_training", model))] for r in (whole, broken)]
    assert logs[0] == logs[1]


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    only = {"name": "torn", "benchmark": "smoke-v1", "models": {"avici": {"type": "avici", "config": {"size": "tiny"}}}}
    whole = create_run(load_config(only, SETTINGS, name="whole"), tmp_path)
    wanted = state_digest(pre_train(whole, "avici").model.state_dict())
    last = whole.checkpoints("avici")/"last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    assert state_digest(pre_train(whole, "avici").model.state_dict()) == wanted
