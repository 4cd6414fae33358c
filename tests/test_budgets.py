"A budget is kept by every model, whatever its settings, and what stopped it is said; pre-training has budgets of its own."
import json
import os
import signal
import time

import pytest
import torch

from causal_meta.datasets.benchmarks import load_benchmark
from causal_meta.datasets.tasks import MetaFixedDataset
from causal_meta.models.base import MODELS, Budget, build_model
from causal_meta.models.pyro_gp import PyroGPConfig, PyroGPSCM
from causal_meta.models.pyro_scm import PyroLinearConfig, PyroLinearSCM
from causal_meta.runners import pre_training
from causal_meta.runners.checkpoints import load_checkpoint
from causal_meta.runners.config import load_config
from causal_meta.runners.evaluation import evaluate
from causal_meta.runners.inference import infer
from causal_meta.runners.pre_training import Preempted, best_model, pre_train
from causal_meta.runners.runs import create_run, read_lines

# settings and numbers of samples with which a method would take minutes; five nodes are few for the exact posterior, which is always done before
LONG = {"exact": [({}, 100)], "mcmc": [({"steps": 10**7}, 100)], "random": [({}, 10**7), ({"graph": {"type": "er", "edges_per_node": 1.}}, 10**6)],
        "dibs": [({"n_steps": 10**6}, 100), ({"mode": "joint", "n_steps": 10**6}, 100), ({"mode": "joint", "mechanism": "mlp", "n_steps": 10**6}, 100)],
        "bayesdag": [({"steps": 10**7}, 1000), ({"mechanism": "nonlinear", "steps": 10**7}, 1000)], "sortability": [({}, 10**7)],
        "avici": [({"size": "tiny"}, 10**7), ({"size": "tiny", "acyclic": True}, 10**7)], "bcnp": [({"size": "tiny"}, 10**7)],
        "pairformer": [({"size": "tiny"}, 10**7), ({"size": "tiny", "head": "edges"}, 10**7)], "pretrained": [({}, 10**7)]}
CASES = [(name, *case) for name in sorted(MODELS) for case in LONG[name]]  # a new model has to say here what would take it long
NAMES = [f"{name}{i}" for name in sorted(MODELS) for i in range(len(LONG[name]))]
MECHANISMS = {"linear-nuts": (PyroLinearSCM, PyroLinearConfig(method="nuts", warmup=10**5)), "linear-svi": (PyroLinearSCM, PyroLinearConfig(method="svi", iterations=10**7)),
              "gp-nuts": (PyroGPSCM, PyroGPConfig(method="nuts", warmup=10**5)), "gp-svi": (PyroGPSCM, PyroGPConfig(method="svi", iterations=10**7))}


def quiet(text): pass
def seeded(seed=0): return torch.Generator().manual_seed(seed)
def first_task(): return MetaFixedDataset(load_benchmark("smoke-v1"))[0]


def ask(name, config, n_samples, budget):
    "The posterior of the first task of smoke-v1; an amortised model is untrained."
    task, model = first_task(), build_model(name, config)
    given = {"n_samples": n_samples, "generator": seeded(), "budget": budget}
    return model.posterior(task.data[None], **given)[0] if MODELS[name].kind == "amortised" else model.posterior(task.data, **given)


def keeps(name, config, n_samples, limit, allowed):
    wall, cpu = time.monotonic(), time.process_time()
    posterior = ask(name, config, n_samples, Budget(seconds=limit))
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    assert min(cpu, wall) < allowed, (cpu, wall)  # on a busy machine a process waits; it should not have worked for longer
    done = name == "exact" or len(posterior.graphs) == n_samples and not {"steps", "n_steps"} & set(config)
    assert posterior.info["stopped_by"] == (None if done else "seconds"), (cpu, wall)
    assert posterior.edge_probs.isfinite().all() and 0 < len(posterior.graphs) <= n_samples


@pytest.mark.parametrize("name, config, n_samples", CASES, ids=NAMES)
def test_a_budget_of_seconds(name, config, n_samples):
    ask(name, config, 2, Budget(seconds=.01))  # what is made once
    keeps(name, config, n_samples, .25, 1.)


@pytest.mark.slow
@pytest.mark.parametrize("name, config, n_samples", CASES, ids=NAMES)
def test_ten_seconds(name, config, n_samples):
    keeps(name, config, n_samples, 10, 11)


@pytest.mark.parametrize("limit, allowed", [(.3, 1.), pytest.param(10, 11, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", MECHANISMS)
def test_mechanisms_within_seconds(kind, limit, allowed):
    "Probabilistic programs, which fit the mechanisms of given graphs."
    model, config = MECHANISMS[kind]
    task = first_task()
    model(config).fit(task.graph, task.data, generator=seeded(), budget=Budget(steps=1))  # what is made once: the first use of Pyro takes a second
    begun = time.process_time()
    fitted = model(config).fit(task.graph, task.data, generator=seeded(), budget=Budget(seconds=limit))
    assert time.process_time() - begun < allowed and fitted.diagnostics["stopped_by"] == "seconds"


@pytest.mark.parametrize("name", sorted(MODELS))
def test_samples_are_what_was_asked_for_at_most(name):
    config = LONG[name][0][0]
    small = {k: 30 for k in config if "steps" in k}
    cut, whole = (ask(name, config | small, n, Budget(samples=7)) for n in (20, 7))
    assert (len(cut.graphs), cut.info["stopped_by"]) == (7, "samples")
    assert (len(whole.graphs), whole.info["stopped_by"]) == (7, None)


@pytest.mark.parametrize("name", ["mcmc", "dibs", "bayesdag", "sortability"])
def test_a_budget_of_steps(name):
    "The others have no steps."
    cut = ask(name, LONG[name][0][0], 100, Budget(steps=5))
    assert cut.info["stopped_by"] == "steps"


def everything(limit, *settings, tasks=1, models=None):
    "A run of all registered models with settings that take long; a benchmark asks for a hundred samples."
    kinds = {name: {"type": name, "config": LONG[name][0][0]} for name in models or sorted(MODELS)}
    return load_config({"name": "bounded", "benchmark": "smoke-v1", "tasks": tasks, "models": kinds, "budget": {"seconds": limit},
                        "pre_training": {"steps": 1, "global_batch": 4}}, settings)


def records_of(config, folder):
    run = create_run(config, folder)
    for model in config.of_kind("amortised"): pre_train(run, model)
    infer(run, say=quiet)
    evaluate(run, say=quiet)
    return run, json.loads(run.raw.read_text())["records"]


def test_raw_records_say_what_stopped_each_posterior(tmp_path):
    run, records = records_of(everything(.1), tmp_path)
    assert {(r["model"], r["family"]) for r in records} == {(m, f) for m in MODELS for f in run.benchmark().test}
    for r in records: assert r["compute"]["stopped_by"] == ("seconds" if r["model"] in ("mcmc", "dibs", "bayesdag") else None), r["model"]
    (line,) = read_lines(run.path/"logs"/"inference.jsonl")
    for model in run.config.of_kind("explicit"):
        cost, parts = line["models"][model], [r["compute"] for r in records if r["model"] == model]
        assert cost["computed"] == len(parts) and cost["seconds"] >= sum(p["seconds"] for p in parts) and cost["peak_rss_bytes"] >= max(p["peak_rss_bytes"] for p in parts)


@pytest.mark.slow
def test_ten_seconds_in_a_run(tmp_path):
    _, records = records_of(everything(10), tmp_path)
    assert len({r["model"] for r in records}) == len(MODELS)
    for r in records: assert r["compute"]["seconds"] < 11, (r["model"], r["family"], r["compute"])


# ---- pre-training

def learner(folder, *settings, name="learner"):
    return create_run(load_config({"name": name, "benchmark": "smoke-v1", "models": {"avici": {"type": "avici", "config": {"size": "tiny"}}},
                                   "pre_training": {"steps": 6, "global_batch": 8, "checkpoint_every": 2, "log_every": 1, "threads": 1}}, settings), folder)


def test_processor_seconds_are_summed_over_interruptions(tmp_path, monkeypatch):
    "Twice told to stop, then left alone; there is a best model, of the last step."
    limit, own, seen, spent = 1.5, pre_training.train_step, [], []
    run = learner(tmp_path, f"budget.training_cpu_seconds={limit}", "pre_training.steps=100000", "pre_training.validate_every=100000", "pre_training.global_batch=1")

    def noting(t, *given, **named):
        line = own(t, *given, **named)
        seen.append((t.step, t.optimizer.param_groups[0]["lr"]))
        if len(seen) in (2, 4): os.kill(os.getpid(), signal.SIGTERM)
        return line
    monkeypatch.setattr(pre_training, "train_step", noting)
    for _ in range(2):
        with pytest.raises(Preempted): pre_train(run, "avici")
        spent.append(load_checkpoint(run.checkpoints("avici")/"last.pt")["cpu_seconds"])
    t = pre_train(run, "avici")
    assert 0 < spent[0] < spent[1] < limit <= t.cpu_seconds
    assert [s for s, _ in seen] == list(range(1, t.step + 1))  # no step twice
    facts = best_model(run, "avici")[1]
    assert (facts["step"], facts["training"]["step"], facts["training"]["stopped_by"]) == (t.step, t.step, "cpu_seconds")
    assert facts["training"]["cpu_seconds"] == t.cpu_seconds and facts["training"]["peak_rss_bytes"] > 10**8
    assert t.optimizer.param_groups[0]["lr"] == 0.  # annealed, at about a thousandth of the steps
    assert pre_train(run, "avici").cpu_seconds == t.cpu_seconds  # nothing left to do


def test_equal_tasks_are_equal_steps_of_unequal_batches(tmp_path):
    "Bit-identical to the same number of steps without a budget."
    by_tasks, by_steps = learner(tmp_path, "budget.training_tasks=48", "pre_training.steps=999", name="tasks"), learner(tmp_path, name="steps")
    for run in (by_tasks, by_steps): pre_train(run, "avici")
    a, b = (best_model(run, "avici") for run in (by_tasks, by_steps))
    assert all(torch.equal(p, q) for p, q in zip(a[0].state_dict().values(), b[0].state_dict().values()))
    assert [m[1]["training"]["stopped_by"] for m in (a, b)] == ["tasks", "steps"]
    config = load_config(by_tasks.config.model_dump(), ["models.avici.pre_training.global_batch=16"])
    assert config.training_of("avici").steps == 3


@pytest.mark.parametrize("settings, why", [
    (["budget.training_tasks=50"], "must be a multiple of the model's global_batch, 8"),
    (["budget.training_tasks=48", "models.avici.pre_training.steps=7"], "models.avici.pre_training.steps is 7, but budget.training_tasks gives 6"),
    (["budget.training_cpu_seconds=9", "pre_training.nodes_first={3: .1}"], "nodes_first counts steps"),
    (["budget.training_cpu_seconds=0"], "training_cpu_seconds"), (["budget.training_task=8"], "did you mean 'training_tasks'")])
def test_contradicting_budgets_are_refused(refused, settings, why):
    assert why in refused("run", "smoke_test", *(word for s in ["pre_training.global_batch=8", *settings] for word in ("--set", s)))


def test_patience_is_told(tmp_path):
    run = learner(tmp_path, "pre_training.patience=1", "pre_training.global_batch=1", "pre_training.validate_every=1", "pre_training.learning_rate=10", "pre_training.warmup=0", "pre_training.steps=50")
    pre_train(run, "avici")
    assert best_model(run, "avici")[1]["training"]["stopped_by"] == "patience"


@pytest.mark.parametrize("workers", [0, 1])
def test_simulating_processes_are_charged(tmp_path, monkeypatch, workers):
    own, asked = pre_training.measuring, []
    monkeypatch.setattr(pre_training, "measuring", lambda children: asked.append(children) or own(children))
    t = pre_train(learner(tmp_path, f"pre_training.workers={workers}", "pre_training.steps=1", "pre_training.global_batch=1"), "avici")
    assert asked == [workers > 0] and t.cpu_seconds > 0
