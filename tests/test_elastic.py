"Several processes train one model: same tasks, same gradient, same curve; and when one fails, all end."
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch

from causal_meta.datasets.benchmarks import load_benchmark
from causal_meta.datasets.streams import MetaIterableDataset
from causal_meta.models.base import build_model
from causal_meta.runners import pre_training
from causal_meta.runners.checkpoints import load_checkpoint, save_checkpoint, state_digest
from causal_meta.runners.config import load_config
from causal_meta.runners.distributed import Rank, joined
from causal_meta.runners.pre_training import Preempted, begin, best_model, pre_train, state_of, take_best
from causal_meta.runners.runs import create_run, read_lines
from causal_meta.runners.steps import gradients, micro_batches
from ranks import free_port, together

BASE = {"name": "base", "benchmark": "audit-small-v1",
        "models": {"avici": {"type": "avici", "config": {"size": "tiny", "dual_every": 1, "dual_warmup": 1, "dual_rate": 0.1}}, "bcnp": {"type": "bcnp", "config": {"size": "tiny"}}, "pairformer": {"type": "pairformer", "config": {"size": "tiny"}}},
        "pre_training": {"steps": 18, "global_batch": 8, "checkpoint_every": 100, "validate_every": 6, "log_every": 1, "threads": 1, "learning_rate": .003}}


# ---- one gradient

def gradient_of_first_step(rank, model):
    "Of 128 tasks of two sizes, in double precision, without dropout; the noise of BCNP is keyed by task."
    torch.manual_seed(0)
    net = build_model(model, {"size": "tiny", **({} if model == "pairformer" else {"dropout": 0.})}).double()
    stream = MetaIterableDataset(load_benchmark("audit-small-v1"), global_batch=128, rank=rank.rank, world_size=rank.world_size)
    share = [replace(batch, data=batch.data.double()) for batch in stream.at(0)]
    with joined(rank): means, _ = gradients(net, micro_batches(share, 32), rank)
    return means["loss"], [None if p.grad is None else p.grad.flatten().tolist() for p in net.parameters()]


@pytest.mark.parametrize("model", [*(pytest.param(m, marks=pytest.mark.slow) for m in ("avici", "bcnp")), "pairformer"])
def test_the_gradient_does_not_depend_on_the_number_of_ranks(model):
    alone = gradient_of_first_step(Rank(), model)
    for loss, grads in together(gradient_of_first_step, 2, model):
        assert abs(loss - alone[0]) < 1e-6
        assert [g is None for g in grads] == [g is None for g in alone[1]]
        largest = max(abs(x) for g in alone[1] if g for x in g)
        for mine, whole in zip(grads, alone[1]):
            if whole: assert max(abs(a - b) for a, b in zip(mine, whole)) < 1e-6*largest


# ---- one curve

def train_a_while(rank, run, model, stop_at, notes):
    "Pre-train until some step, noting the keys of the tasks of each step; the digest of the model's weights at the end."
    own = pre_training.train_step
    def noting(t, share, *given, **named):
        with open(f"{notes}/{rank.world_size}.{rank.rank}.jsonl", "a") as f:
            f.write(json.dumps([t.step, [key for batch in share for key in batch.keys]]) + "\n")
        line = own(t, share, *given, **named)
        if t.step == stop_at and rank.is_main: os.kill(os.getpid(), signal.SIGTERM)  # one rank is told; all stop
        return line
    pre_training.train_step = noting
    try: return state_digest(pre_train(run, model, rank).model.state_dict())
    except Preempted as e: return str(e)


@pytest.mark.parametrize("model", [*(pytest.param(m, marks=pytest.mark.slow) for m in ("avici", "bcnp")), "pairformer"])
def test_one_rank_then_two_then_one(tmp_path, model):
    whole, parts = (create_run(load_config(BASE, name=name), tmp_path) for name in ("whole", "parts"))
    notes = {name: tmp_path/f"{name}-notes" for name in ("whole", "parts")}
    for folder in notes.values(): folder.mkdir()
    together(train_a_while, 1, whole, model, None, notes["whole"])
    for world, stop_at in ((1, 5), (2, 11)):
        assert together(train_a_while, world, parts, model, stop_at, notes["parts"]) == [f"{model}: asked to stop; saved at step {stop_at} of 18."]*world
    together(train_a_while, 1, parts, model, None, notes["parts"])

    def keys(name):  # the set of each step's tasks, over all ranks
        steps = {}
        for file in notes[name].iterdir():
            for line in file.read_text().splitlines():
                step, seen = json.loads(line)
                steps[step] = steps.get(step, []) + [tuple(k) for k in seen]
        return {step: sorted(seen) for step, seen in steps.items()}
    assert keys("parts") == keys("whole") and len(keys("whole")) == 18
    a, b = ([line["loss"] for line in read_lines(run.log("pre_training", model))] for run in (whole, parts))
    assert len(a) == len(b) == 18
    assert max(abs(x - y)/abs(x) for x, y in zip(a, b)) < 1e-3
    assert a[:5] == b[:5]
    if model == "avici":  # the multiplier follows the radius of the global batch, whatever the ranks
        duals = [load_checkpoint(run.checkpoints(model)/"last.pt")["model_state_dict"]["dual"].item() for run in (whole, parts)]
        assert duals[0] > .05 and abs(duals[0] - duals[1]) < 1e-3*duals[0]


def test_ranks_agree_where_processor_seconds_end(tmp_path):
    "One rank works harder than the other; what counts is their sum."
    run = create_run(load_config({**BASE, "benchmark": "smoke-v1"}, ["budget.training_cpu_seconds=2", "pre_training.steps=100000", "pre_training.validate_every=100000"], name="limited"), tmp_path)
    (first, spent, digest), (step, other, same) = together(train_until_spent, 2, run)
    assert (first, spent, digest) == (step, other, same) and 2 <= spent < 10
    facts = best_model(run, "avici")[1]["training"]
    assert (facts["step"], facts["cpu_seconds"], facts["stopped_by"]) == (step, spent, "cpu_seconds")


def train_until_spent(rank, run):
    if rank.rank == 1:
        own = pre_training.train_step
        def slower(*given, **named):
            until = time.process_time() + .1
            while time.process_time() < until: pass
            return own(*given, **named)
        pre_training.train_step = slower
    t = pre_train(run, "avici", rank)
    return t.step, t.cpu_seconds, state_digest(t.model.state_dict())


# ---- the best weights, everywhere

def test_every_rank_ends_with_the_best_weights(tmp_path):
    wild = create_run(load_config(BASE, ["pre_training.learning_rate=.5", "pre_training.warmup=1", "pre_training.validate_every=3"], name="wild"), tmp_path)
    (tmp_path/"notes").mkdir()
    digests = together(train_a_while, 2, wild, "avici", None, tmp_path/"notes")
    best, last = (load_checkpoint(wild.checkpoints("avici")/f"{name}.pt") for name in ("best", "last"))
    assert best["step"] < last["step"] == 18  # at such a rate the last weights are not the best
    assert digests == [state_digest(best["model_state_dict"])]*2


def test_best_weights_go_to_the_device_of_each_rank(tmp_path, monkeypatch):
    "There is no accelerator here, so the places that ask for one are replaced."
    t = begin(load_config(BASE), "avici", load_benchmark("audit-small-v1"))
    save_checkpoint(tmp_path/"best.pt", state_of(t))
    asked, load = [], torch.load
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "load", lambda path, map_location, **options: asked.append(map_location) or load(path, map_location="cpu", **options))
    for local in (0, 3): take_best(t, tmp_path, Rank(4 + local, local, 8))
    assert asked == [torch.device("cuda", 0), torch.device("cuda", 3)]


# ---- a failure on one rank

def test_a_crash_on_one_rank_ends_the_job_with_its_traceback(tmp_path):
    run = create_run(load_config(BASE, name="crash"), tmp_path)
    script = tmp_path/"job.py"
    script.write_text(textwrap.dedent(f"""
        from pathlib import Path
        from causal_meta.runners import pre_training
        from causal_meta.runners.distributed import rank_of
        from causal_meta.runners.runs import RunDir

        own = pre_training.train_step
        def failing(t, *given, **named):
            if t.step == 3 and rank_of().rank == 1: raise RuntimeError("this rank has had enough")
            return own(t, *given, **named)
        pre_training.train_step = failing
        pre_training.pre_train(RunDir(Path({str(run.path)!r})), "avici")
        """))
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", str(script)],
                          capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    assert "RuntimeError: this rank has had enough" in done.stderr and "in failing" in done.stderr
    assert time.monotonic() - begun < 200  # it did not wait for any time-out of a collective operation
    assert len(read_lines(run.log("pre_training", "avici"))) == 3
