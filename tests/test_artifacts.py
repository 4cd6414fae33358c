"Posteriors as files: what damages them is found, what fits them is trusted, and whoever is killed while making them loses nothing."
import json
import os
import random
import subprocess
import sys
import time

import pytest
import torch

from causal_meta.datasets.benchmarks import load_benchmark
from causal_meta.datasets.tasks import MetaFixedDataset
from causal_meta.datasets.validation import InputError
from causal_meta.models.base import MODELS, Budget, Posterior, build_model
from causal_meta.models.exact import Exact
from causal_meta.runners.config import load_config
from causal_meta.runners.evaluation import evaluate
from causal_meta.runners.inference import Unfinished, infer
from causal_meta.runners.runs import create_run
from alike import alike

MODELS_OF_RUN = {"exact": {"type": "exact"}, "random": {"type": "random", "config": {"edges_per_node": 1.5}}}


def quiet(text): pass


def make(folder, **changes):
    return create_run(load_config({"name": "r", "benchmark": "smoke-v1", "models": MODELS_OF_RUN, **changes}), folder)


def contents(run):
    "Every artifact, without what it cost."
    found = {}
    for path in sorted((run.path/"inference").rglob("*.safetensors")):
        p = Posterior.load(path)
        info = {k: v for k, v in p.info.items() if k not in ("compute", "made_of")}
        found[str(path.relative_to(run.path))] = (info, p.edge_probs, p.graphs, p.parameters)
    return found


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name][0] == b[name][0], name
        assert torch.equal(a[name][1], b[name][1]) and torch.equal(a[name][2], b[name][2]), name
        assert all(torch.equal(v, b[name][3][k]) for k, v in a[name][3].items()), name


def records(run):
    raw = json.loads(run.raw.read_text())["records"]
    return [{k: v for k, v in r.items() if k not in ("compute", "made_of")} for r in raw], {k: v for k, v in json.loads(run.summary.read_text()).items() if k not in ("compute", "break_even")}


def test_damage_and_age_are_found_and_change_no_result(tmp_path):
    run = make(tmp_path)
    infer(run, say=quiet)
    evaluate(run, say=quiet)
    clean, artifacts = records(run), contents(run)
    paths = sorted((run.path/"inference").rglob("*.safetensors"))
    expected = {}

    def harm(path, why, change):
        change(path)
        expected[path] = why

    def flip(path):
        content = bytearray(path.read_bytes())
        content[-40] ^= 1  # in the last tensor: no reader of the format would notice
        path.write_bytes(content)

    def relabel(key):
        def change(path):
            p = Posterior.load(path)
            p.info["provenance"][key] = "0"*64
            p.save(path)
        return change

    def without_seal(path):  # as another program, or an older version, would write it
        from safetensors.torch import load, save_file
        save_file(load(path.read_bytes()), path)

    harm(paths[0], "missing", lambda p: p.unlink())
    harm(paths[1], "damaged", lambda p: p.write_bytes(p.read_bytes()[:-30]))
    harm(paths[2], "damaged", lambda p: p.write_bytes(b""))
    harm(paths[3], "damaged", flip)
    harm(paths[4], "damaged", without_seal)
    for path, key in zip(paths[5:9], ("model", "config", "benchmark", "data")): harm(path, f"stale ({key} changed)", relabel(f"{key}_sha256"))
    said = []
    evaluate(run, say=said.append)
    alike(records(run), clean)
    same(contents(run), artifacts)
    for path, why in expected.items():
        model, family, index = path.relative_to(run.path/"inference").parts[0], path.parent.name, path.stem
        assert [s for s in said if s.startswith(f"{model}: ") and f"{family} {index} was {why}: computed" in s], (path, why, said)
    assert len([s for s in said if "computed" in s]) == len(expected)


def test_artifacts_of_another_budget_seed_or_setting_are_not_used(tmp_path):
    infer(make(tmp_path), say=quiet)
    for change, why in [({"budget": {"samples": 7}}, "config"), ({"posterior_seed": 1}, "config"),
                        ({"models": {**MODELS_OF_RUN, "random": {"type": "random", "config": {"p": .1}}}}, "model")]:
        run = create_run(load_config({"name": "r", "benchmark": "smoke-v1", "models": MODELS_OF_RUN, **change}), tmp_path, fork=True)
        report = infer(run, ["random"], say=quiet)
        assert report.computed == 6 and all(f"stale ({why}" in line for line in report.redone), report
    # what training is like, and which tasks others do, is none of an explicit model's business
    again = create_run(load_config({"name": "r", "benchmark": "smoke-v1", "models": run.config.model_dump(mode="json")["models"], "training_seed": 5, "tasks": 1,
                                    "pre_training": {"steps": 7}}), tmp_path, fork=True)
    assert infer(again, ["random"], say=quiet).kept == 3


def test_the_model_is_not_touched_where_artifacts_are(tmp_path, monkeypatch):
    run = make(tmp_path)
    infer(run, say=quiet)
    evaluate(run, say=quiet)
    clean, calls, built = records(run), [], []
    whole = Exact.posterior

    def counted(self, *args, **kwargs):
        calls.append(1)
        return whole(self, *args, **kwargs)
    monkeypatch.setattr(Exact, "posterior", counted)
    monkeypatch.setattr("causal_meta.runners.inference.build_model", lambda *a: built.append(a) or build_model(*a))
    evaluate(run, say=quiet)
    assert infer(run, say=quiet).kept == 12
    assert (calls, built) == ([], [])
    alike(records(run), clean)
    run.artifact("exact", "id/linear_er", 1).unlink()
    evaluate(run, say=quiet)
    assert len(calls) == 1 and len(built) == 1
    alike(records(run), clean)


def test_a_failure_is_noted_and_the_rest_is_done(tmp_path, monkeypatch):
    run, whole = make(tmp_path), Exact.posterior
    doomed = MetaFixedDataset(run.benchmark())[3]

    def breaks(self, data, *args, **kwargs):
        if torch.equal(data, doomed.data): raise FloatingPointError("the fourth task\nbreaks it")
        return whole(self, data, *args, **kwargs)
    monkeypatch.setattr(Exact, "posterior", breaks)
    report = infer(run, say=quiet)
    name = f"inference/exact/{doomed.family}/{doomed.index}.safetensors"
    assert (report.computed, report.failed) == (11, [f"{name}: FloatingPointError: the fourth task breaks it"])
    with pytest.raises(Unfinished, match=f"1 of the posteriors failed, and the rest is done: {name}"): report.check()
    note = (run.path/name).with_suffix(".failed.json")
    assert "FloatingPointError" in json.loads(note.read_text())["traceback"] and not (run.path/name).exists()
    with pytest.raises(Unfinished, match="exact on id/linear_sf 1 of a: FloatingPointError"): evaluate(run, say=quiet)
    assert len(records(run)[0]) == 11  # written before it complains
    monkeypatch.setattr(Exact, "posterior", whole)
    assert infer(run, say=quiet).computed == 1 and not note.exists()
    evaluate(run, say=quiet)
    assert len(records(run)[0]) == 12


def test_the_command_ends_with_one_and_the_list(cli, tmp_path):
    "The kernel of the job gets a broken method by way of `sitecustomize`."
    (tmp_path/"lib").mkdir()
    (tmp_path/"lib"/"sitecustomize.py").write_text("import sys\nif 'ipykernel_launcher' in sys.argv[0] or '-m' in sys.argv[:1]:\n"
                                                   "    import causal_meta.models.random as r\n    def broken(*a, **k): raise MemoryError('no room')\n    r.Random.posterior = broken\n")
    run = make(tmp_path/"experiments", tasks=1)
    done = cli("infer", "r", PYTHONPATH=str(tmp_path/"lib"))
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("causal-meta: 3 of the posteriors failed, and the rest is done: ")
    assert "inference/random/id/linear_er/0.safetensors: MemoryError: no room" in done.stderr
    assert len(contents(run)) == 3
    again = infer(run, say=quiet)
    assert (again.computed, again.kept, again.failed) == (3, 3, [])


INFER = "import sys; from pathlib import Path; from causal_meta.runners.inference import infer; from causal_meta.runners.runs import RunDir; print(infer(RunDir(Path(sys.argv[1]))))"


def start(run):
    return subprocess.Popen([sys.executable, "-c", INFER, str(run.path)], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_at_once_and_killed_at_random(tmp_path):
    "Two processes on one list; and one list whose process is killed again and again."
    clean = make(tmp_path/"clean", benchmark="exact5-v1", tasks=4)
    assert infer(clean, say=quiet).computed == 16
    expected = contents(clean)
    both = make(tmp_path/"both", benchmark="exact5-v1", tasks=4)
    workers = [start(both), start(both)]
    assert [w.wait(timeout=300) for w in workers] == [0, 0]
    same(contents(both), expected)
    killed, dice = make(tmp_path/"killed", benchmark="exact5-v1", tasks=4), random.Random(0)
    for kill in range(2):
        worker, goal = start(killed), 6*kill + dice.randint(1, 4)
        while worker.poll() is None and len(list((killed.path/"inference").rglob("*.safetensors"))) < goal: time.sleep(dice.random()*.01)
        worker.kill()
        worker.wait()
    there = contents(killed)  # every one of them can be read
    assert 6 < len(there) < 16
    same(there, {k: v for k, v in expected.items() if k in there})
    report = infer(killed, say=quiet)
    assert (report.kept, report.computed, report.redone) == (len(there), 16 - len(there), [])
    same(contents(killed), expected)


def test_a_budget_of_nothing_is_refused(refused, tmp_path):
    for key in ("seconds", "steps", "samples"):
        said = refused("run", "smoke_test", "--set", f"budget.{key}=0")
        assert "budget" in said and key in said
        with pytest.raises(InputError, match=f"'{key}' is 0; it must be greater than 0"): Budget(**{key: 0})


EXPLICIT = sorted(name for name, entry in MODELS.items() if entry.kind == "explicit")


@pytest.mark.parametrize("name", EXPLICIT)
def test_every_explicit_model_refuses_what_it_cannot_use(name):
    "One sentence that begins with the method and says what is allowed."
    model, g = build_model(name), torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=g)
    holes = x.clone()
    holes[3, 2] = torch.nan
    cases = [(x, torch.ones(40, 4).bool(), "every value was set by an intervention"), (holes, None, "missing or infinite"), (x[:0], None, "rows?; at least"),
             (x[:, :1], None, "at least 2"), (x, torch.zeros(40, 3).bool(), "must be that of data"), (x[None], None, r"must be \(n, d\)")]
    if model.max_nodes is not None: cases.append((torch.randn(40, model.max_nodes + 1), None, f"it takes at most {model.max_nodes}"))
    for data, mask, why in cases:
        with pytest.raises(InputError, match=why) as said: model.posterior(data, mask, n_samples=2, generator=g)
        assert str(said.value).startswith(name.split("_")[0]) and "\n" not in str(said.value)


@pytest.mark.parametrize("name", EXPLICIT)
def test_every_explicit_model_keeps_its_budget_and_its_seed(name):
    "Within a second, marked, and the same again from the same seed when steps and samples decide."
    model = build_model(name)
    task = MetaFixedDataset(load_benchmark("exact5-v1"))[0]
    mask = torch.zeros_like(task.data, dtype=torch.bool)
    mask[:20, 1] = True

    def ask(budget, seed=0, k=5): return model.posterior(task.data, mask, n_samples=k, generator=torch.Generator().manual_seed(seed), budget=budget)
    ask(Budget(seconds=.2))  # what is made once
    begun = time.process_time()
    answer = ask(Budget(seconds=1.))
    assert time.process_time() - begun < 1.6
    assert answer.graphs is not None and answer.edge_probs.isfinite().all() and answer.info["model"] == name
    assert answer.info["stopped_by"] in (None, "seconds")
    small = Budget(steps=30, samples=3)
    a, b = ask(small), ask(small)
    assert len(a.graphs) <= 3 and a.info["stopped_by"] in ("steps", "samples")
    assert torch.equal(a.edge_probs, b.edge_probs) and torch.equal(a.graphs, b.graphs)
    state = torch.random.get_rng_state()
    ask(small, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", ["explicit5", "linear20"])
def test_the_shipped_configurations_of_explicit_methods_run(tmp_path, name):
    "One task, a few steps of each."
    run = create_run(load_config(name, ["tasks=1", "budget.steps=3", "budget.samples=4"]), tmp_path)
    report = infer(run, say=quiet)
    assert (report.refused, report.failed) == ([], []) and report.computed == len(run.config.models)*len(run.benchmark().test)
