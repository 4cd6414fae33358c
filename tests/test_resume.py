"Pre-training that is killed or told to stop, again and again, goes on as if nothing had happened: real processes, real signals."
import multiprocessing
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from causal_meta.runners.checkpoints import load_checkpoint, state_digest
from causal_meta.runners.config import load_config
from causal_meta.runners.pre_training import Preempted, pre_train
from causal_meta.runners.runs import create_run, read_lines

BASE = {"name": "base", "benchmark": "audit-small-v1",  # tables of 5 to 10 columns and 100 to 200 rows
        "models": {"avici": {"type": "avici", "config": {"size": "tiny", "dropout": .1, "dual_every": 5, "dual_warmup": 5}},
                   "bcnp": {"type": "bcnp", "config": {"size": "tiny", "dropout": .1}}},
        "pre_training": {"steps": 24, "global_batch": 4, "checkpoint_every": 2, "validate_every": 12, "log_every": 1, "threads": 1,
                         "rows": 32, "rows_hold": .5, "nodes_first": {4: .25}}}  # and fewer rows and nodes at first
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["causal_meta.runners.pre_training"])


def work(run, model):
    "What a process does: pre-train, and leave with 85 if told to stop."
    try: pre_train(run, model)
    except Preempted as e: sys.exit(e.exit_code)


def last(run, model): return load_checkpoint(run.checkpoints(model)/"last.pt")
def reached(run, model): return max((line["step"] for line in read_lines(run.log("pre_training", model))), default=0)


def same_end(one, other, model):
    "Everything that training leaves behind is equal, bit for bit; only the clock differs."
    for file in ("last.pt", "best.pt"):
        a, b = (load_checkpoint(r.checkpoints(model)/file) for r in (one, other))
        for part in a.keys() - PRICE: assert state_digest(a[part]) == state_digest(b[part]), (file, part)
    logs = [[{k: v for k, v in line.items() if "seconds" not in k} for line in read_lines(r.log("pre_training", model))] for r in (one, other)]
    assert logs[0] == logs[1]


PRICE = {"seconds", "cpu_seconds", "peak_rss_bytes", "peak_device_bytes", "training", "rng_state"}  # what it took
LONG = ["pre_training.steps=400", "pre_training.validate_every=100"]  # room for twenty interruptions on a fast machine


def whole(folder, *settings):
    "A run of both models that nobody disturbs."
    run = create_run(load_config(BASE, settings, name="undisturbed"), folder)
    for model in BASE["models"]: pre_train(run, model)
    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory): return whole(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def long_undisturbed(tmp_path_factory): return whole(tmp_path_factory.mktemp("long"), *LONG)


def interrupt(run, model, number, times, seed):
    "Start the work and send it a signal, `times` over, each after a random number of steps and a random moment; then let it finish."
    rng, landed = random.Random(seed), 0
    for _ in range(times):
        wait_for, pause = reached(run, model) + rng.randint(0, 3), rng.uniform(0, .3)
        process = PROCESSES.Process(target=work, args=(run, model))
        process.start()
        until = time.monotonic() + 120
        while process.is_alive() and reached(run, model) <= wait_for and time.monotonic() < until: time.sleep(.01)
        time.sleep(pause)
        if process.is_alive():
            landed += 1
            family = psutil.Process(process.pid)
            family = [family, *family.children(recursive=True)] if number == signal.SIGKILL else [family]
            for p in family: p.send_signal(number)
        process.join(120)
        assert process.exitcode in ((-9,) if number == signal.SIGKILL else (85, 0)), process.exitcode
    pre_train(run, model)
    return landed


# in CI one model is killed and the other told to stop, twice each; the other way round, and 20 times, with and without workers, under scripts/test --all
@pytest.mark.parametrize("model, number, workers", [("avici", signal.SIGKILL, 2), ("bcnp", signal.SIGTERM, 0),
                                                    *(pytest.param(*case, marks=pytest.mark.slow) for case in [("bcnp", signal.SIGKILL, 0), ("avici", signal.SIGTERM, 2)])])
def test_interrupted_and_resumed_is_bit_identical(tmp_path, undisturbed, model, number, workers):
    broken = create_run(load_config(BASE, [f"pre_training.workers={workers}"], name="broken"), tmp_path)
    assert interrupt(broken, model, number, 2, seed=f"{model}{number}{workers}") == 2
    same_end(undisturbed, broken, model)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("model", BASE["models"])
def test_twenty_interruptions_are_bit_identical(tmp_path, long_undisturbed, model, number, workers):
    broken = create_run(load_config(BASE, [*LONG, f"pre_training.workers={workers}"], name="broken"), tmp_path)
    assert interrupt(broken, model, number, 20, seed=f"twenty{model}{number}{workers}") == 20
    same_end(long_undisturbed, broken, model)


def test_a_signal_to_the_command_reaches_the_kernel(tmp_path, undisturbed):
    "`causal-meta pretrain` works in papermill's kernel, a process of another session; its exit code asks for a place in the queue."
    run = create_run(load_config({**BASE, "models": {"avici": BASE["models"]["avici"]}}, name="told"), tmp_path)
    command = [sys.executable, "-m", "causal_meta", "pretrain", str(run.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while reached(run, "avici") < 5 and process.poll() is None and time.monotonic() < until: time.sleep(.05)
    process.send_signal(signal.SIGUSR1)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 85, stderr
    step = last(run, "avici")["step"]
    assert stderr.strip() == f"causal-meta: avici: asked to stop; saved at step {step} of 24."
    assert (run.path/"notebooks"/"attempts"/"pre_training-001.stopped.ipynb").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert f"avici: resuming from last.pt at step {step}" in again.stdout
    same_end(undisturbed, run, "avici")
    assert {p.name for p in (run.path/"notebooks"/"attempts").iterdir()} == {"pre_training-001.stopped.ipynb", "pre_training-002.ipynb"}  # every attempt is kept
    assert (run.path/"notebooks"/"pre_training.ipynb").read_bytes() == (run.path/"notebooks"/"attempts"/"pre_training-002.ipynb").read_bytes()


def test_a_torn_checkpoint_is_passed_over(tmp_path, undisturbed, capsys):
    torn = create_run(load_config(BASE, name="torn"), tmp_path)
    pre_train(torn, "avici")
    file = torn.checkpoints("avici")/"last.pt"
    file.write_bytes(file.read_bytes()[:1000])
    pre_train(torn, "avici")
    assert "is damaged or not a checkpoint" in (said := capsys.readouterr().out) and "Resuming from its predecessor at step 22" in said
    same_end(undisturbed, torn, "avici")
