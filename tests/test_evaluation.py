"Evaluation shared by ranks, interrupted, or repeated, gives the same results; nothing is padded, done twice or compared by position."
import json
import signal
import subprocess
import sys
import time
from importlib.resources import files

import jsonschema
import pytest

from causal_meta.datasets.benchmarks import load_benchmark
from causal_meta.datasets.tasks import MetaFixedDataset
from causal_meta.metrics.summary import METRICS
from causal_meta.runners.config import load_config
from causal_meta.runners.evaluation import evaluate, key_of
from causal_meta.runners.inference import infer
from causal_meta.runners.pre_training import pre_train
from causal_meta.runners.records import units
from causal_meta.runners.runs import create_run, find_run
from ranks import together

MODELS = {"avici": {"type": "avici", "config": {"size": "tiny"}}, "exact": {"type": "exact"}, "random": {"type": "random"},
          "bayesdag": {"type": "bayesdag", "config": {"steps": 60}}}
TRAINING = {"steps": 2, "global_batch": 8, "validate_every": 2}


def quiet(text): pass


def make(path, name="r", **changes):
    config = {"name": name, "benchmark": "smoke-v1", "models": MODELS, "seed_lists": ["a", "b"], "pre_training": TRAINING}
    run = create_run(load_config(config | changes), path)
    pre_train(run, "avici")
    return run


def results(run):
    "Both files without what is measured, checked against their schemas."
    raw, summary = json.loads(run.raw.read_text()), json.loads(run.summary.read_text())
    for name, content in (("metrics_raw", raw), ("metrics_summary", summary)):
        jsonschema.validate(content, json.loads((files("causal_meta")/"schemas"/f"{name}.schema.json").read_text()))
    bare = [{k: v for k, v in r.items() if k not in ("compute", "made_of")} for r in raw["records"]]
    return bare, {k: v for k, v in summary.items() if k not in ("compute", "break_even")}


def one_rank(rank, path):
    evaluate(find_run(path), say=quiet, rank=rank)


def test_three_ranks_write_what_one_writes(tmp_path):
    alone, shared = (make(tmp_path, name, tasks=1) for name in ("alone", "shared"))
    infer(alone, say=quiet)
    evaluate(alone, say=quiet)
    together(one_rank, 3, str(shared.path))  # the posteriors of explicit models too are made there
    assert results(shared) == results(alone)
    records, summary = results(alone)
    keys = [key_of(r) for r in records]
    data = load_benchmark("smoke-v1")
    assert sorted(keys) == sorted((m, s, f, k) for m in MODELS for s in "ab" for f, k in MetaFixedDataset(data, s, most=1).keys)
    for r in records:
        assert set(r["metrics"]) == set(METRICS)
        assert {k for k, v in r["metrics"].items() if v is None} <= set(r["metrics_info"])
    assert {r["metrics_info"]["nil"] for r in records if r["family"] == "id/linear_er"} == {"linear_gaussian"}
    assert all(r["metrics"]["nil_native"] is not None for r in records if r["model"] == "bayesdag")
    assert not list(alone.parts.glob("*.json"))


def test_units_hold_every_task_once():
    for name, tasks in (("smoke-v1", None), ("pairs-v1", 60), ("audit-small-v1", 3), ("real-v1", None)):
        config, benchmark = load_config({"name": "x", "benchmark": name, "tasks": tasks, "models": {"random": {"type": "random"}}}), load_benchmark(name)
        data, found = MetaFixedDataset(benchmark, "a", most=tasks), units(config, benchmark)
        assert [p for u in found for p in u.positions] == list(range(len(data)))
        for u in found: assert [data.keys[p] for p in u.positions] == [(u.family, u.first + k) for k in range(len(u.positions))]
        assert len({u.name for u in found}) == len(found)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(tmp_path):
    clean, run = make(tmp_path, "clean"), make(tmp_path, "killed")
    evaluate(clean, say=quiet)
    process = subprocess.Popen([sys.executable, "-c", f"from causal_meta.runners.evaluation import evaluate; from causal_meta.runners.runs import find_run; evaluate(find_run({str(run.path)!r}))"])
    until = time.monotonic() + 120
    while len(list(run.parts.glob("*.json"))) < 2 and time.monotonic() < until: time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    parts = {p: p.read_bytes() for p in run.parts.glob("*.json")}
    assert 2 <= len(parts) < 6
    done = {key_of(r): r["compute"] for part in parts.values() for r in json.loads(part)["records"]}
    evaluate(run, say=quiet)
    assert results(run) == results(clean)
    assert {k: v for k, v in ((key_of(r), r["compute"]) for r in json.loads(run.raw.read_text())["records"]) if k in done} == done  # kept as they were


def test_other_weights_are_evaluated_again(tmp_path):
    run = make(tmp_path, tasks=1)
    evaluate(run, say=quiet)
    before = {key_of(r): r["made_of"] for r in json.loads(run.raw.read_text())["records"]}
    again = create_run(load_config({"name": "r", "benchmark": "smoke-v1", "models": MODELS, "seed_lists": ["a", "b"], "tasks": 1, "pre_training": TRAINING | {"steps": 4}}), tmp_path, fork=True)
    pre_train(again, "avici")
    evaluate(again, say=quiet)
    after = {key_of(r): r["made_of"] for r in json.loads(run.raw.read_text())["records"]}
    assert {k[0] for k in before if before[k] != after[k]} == {"avici"}
    assert len({after[k] for k in after if k[0] == "avici"}) == 1


@pytest.mark.parametrize("likelihood", ["linear_gaussian", "gp"])
def test_a_scorer_for_all(tmp_path, likelihood):
    run = make(tmp_path, likelihood=likelihood, tasks=1, seed_lists=["a"])
    evaluate(run, ["exact", "random"], say=quiet)
    assert {r["metrics_info"]["nil"] for r in json.loads(run.raw.read_text())["records"]} == {likelihood}
