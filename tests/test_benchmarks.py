"A frozen benchmark cannot drift: neither its file nor its generator may change without a test failing."
import json
import os

import pytest
import torch

from causal_meta.datasets import gp_features, mechanisms, nonlinear, scm
from causal_meta.datasets.benchmarks import benchmarks, drifted, fingerprint, freeze, frozen_folder, load_benchmark, verify
from causal_meta.datasets.graphs import ErdosRenyi
from causal_meta.datasets.schema import Benchmark
from causal_meta.datasets.validation import InputError, parse


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in ("audit-v1", "bcnp20-v1", "real-v1") else ()) for name in benchmarks()])  # the small audit has the same families, and test_real.py the real data
def test_nothing_has_drifted(name):
    if name == "real-v1" and not os.environ.get("CAUSAL_META_DATA"): pytest.skip("real data: CAUSAL_META_DATA is not set")
    if name == "networks-v1": pytest.importorskip("pgmpy", reason="the extra `networks` is not installed")
    assert verify(name) == {"name": name, "sha256_ok": True, "fingerprint_ok": True, "drifted": []}


@pytest.mark.parametrize("name", benchmarks())
def test_name_file_and_content_agree(name):
    benchmark = load_benchmark(name)
    assert benchmark.name == name and name.endswith(f"-v{benchmark.version}")
    assert parse(Benchmark, json.loads(benchmark.to_json()), name) == benchmark
    seeds = [benchmark.seeds.train, benchmark.seeds.validation, *benchmark.seeds.test.values()]
    assert len(set(seeds)) == len(seeds) and set(benchmark.seeds.test) == {"a", "b", "c"}


def test_what_must_ship():
    assert {"smoke-v1", "sachs11-v1"} <= set(benchmarks())
    smoke, sachs = load_benchmark("smoke-v1"), load_benchmark("sachs11-v1")
    assert {(f.d, f.n, f.tasks) for f in smoke.test.values()} == {(5, 100, 2)} and len(smoke.test) == 3
    assert (sachs.train.d, sachs.train.n) == ((11,), (100, 200, 400, 853))
    for b in (smoke, sachs): assert {f.scm.model_dump_json() for f in b.train.families.values()} == {f.scm.model_dump_json() for f in b.test.values()}


def linear_scale(monkeypatch):
    before = mechanisms.Linear.apply
    monkeypatch.setattr(mechanisms.Linear, "apply", lambda self, params, *rest: before(self, params | {"scale": 1.01*params["scale"]}, *rest))


def neural_activation(monkeypatch):
    before = mechanisms.F.leaky_relu_
    monkeypatch.setattr(mechanisms.F, "leaky_relu_", lambda x, slope: before(x, 2*slope))


def square_bound(monkeypatch): monkeypatch.setattr(nonlinear, "BOUND", 1.01*nonlinear.BOUND)


def periodic_frequency(monkeypatch):
    before = nonlinear.Periodic.mean
    monkeypatch.setattr(nonlinear.Periodic, "mean", lambda self, params, parents: before(self, {"weight": 1.01*params["weight"]}, parents))


def gp_amplitude(monkeypatch):
    before = gp_features.GPCDE.init
    def changed(self, *given):
        params = before(self, *given)
        return params | {"amplitude": 1.01*params["amplitude"]}
    monkeypatch.setattr(gp_features.GPCDE, "init", changed)


@pytest.mark.parametrize("change, name", [(square_bound, "mechanism/square"), (periodic_frequency, "mechanism/periodic"), (gp_amplitude, "id/gpcde_er")])
def test_changed_constant_of_each_kind(monkeypatch, change, name):
    "A change of one per cent in a mechanism of the audit is noticed, and only where that mechanism is used."
    seal = json.loads((frozen_folder()/"audit-small-v1.json").read_text())["fingerprint"]
    benchmark = load_benchmark("audit-small-v1")
    assert name in benchmark.test
    few = benchmark.model_copy(update={"test": {k: v for k, v in benchmark.test.items() if k in (name, "id/linear_er")}})
    kept = {f"{k}@{s}" for k in (name, "id/linear_er") for s in "abc"}
    seal = seal | {"sketches": {k: v for k, v in seal["sketches"].items() if k in kept}}
    def found():
        now = fingerprint(few, seal["columns"])
        return set(drifted(seal | {"graphs": now["graphs"]}, now | {"sketches": {k: v for k, v in now["sketches"].items() if k in kept}}))
    assert not found()
    change(monkeypatch)
    assert found() == {f"{name}@{s}" for s in "abc"}


def reference_rows(monkeypatch): monkeypatch.setattr(scm, "REFERENCE_ROWS", scm.REFERENCE_ROWS + 100)


def graph_sampler(monkeypatch):
    before = ErdosRenyi.sample
    monkeypatch.setattr(ErdosRenyi, "sample", lambda self, streams, d: before(self, streams, d).flip(-1, -2))


@pytest.mark.parametrize("change, parts", [(linear_scale, {"id/linear_er@a", "id/linear_sf@c", "train", "validation"}), (neural_activation, {"id/neural_net_er@a", "train"}),
                                           (reference_rows, {"id/linear_er@b", "id/neural_net_er@b"}), (graph_sampler, {"graphs", "id/linear_er@a"})])
def test_changed_generator(monkeypatch, change, parts):
    change(monkeypatch)
    report = verify("smoke-v1")
    assert report["sha256_ok"] and not report["fingerprint_ok"] and parts <= set(report["drifted"])
    if change is linear_scale: assert "id/neural_net_er@a" not in report["drifted"]


EDITS = {
    "a seed": lambda b: b["seeds"]["test"].update(a=1),
    "a number of tasks": lambda b: b["test"]["id/linear_er"].update(tasks=3),
    "a mechanism": lambda b: b["train"]["families"]["linear_er"]["scm"]["mechanism"].update(weight_scale=9.),
    "a description": lambda b: b.update(description="Other words."),
    "a default left out": lambda b: b.pop("n_test"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_edited_file(tmp_path, edit):
    stored = json.loads((frozen_folder()/"smoke-v1.json").read_text())
    edit(stored["benchmark"])
    path = tmp_path/"smoke-v1.json"
    path.write_text(json.dumps(stored))
    with pytest.raises(InputError, match="smoke-v1.json was edited after it was frozen"): load_benchmark(path)
    assert not verify(path)["sha256_ok"]


def test_format_does_not_matter(tmp_path):
    "The seal is on the content: spaces and the order of keys may change."
    stored = json.loads((frozen_folder()/"smoke-v1.json").read_text())
    stored["benchmark"] = dict(reversed(stored["benchmark"].items()))
    path = tmp_path/"other.json"
    path.write_text(json.dumps(stored, indent=7))
    assert load_benchmark(path) == load_benchmark("smoke-v1")


@pytest.mark.parametrize("text, says", [("{", "is not valid JSON"), ("[]", "is not a frozen benchmark"), ('{"benchmark": {}, "sha256": ""}', "the key 'name' is missing"),
                                        ('{"benchmark": 3, "sha256": ""}', "expected keys with values")])
def test_broken_file(tmp_path, text, says):
    path = tmp_path/"b.json"
    path.write_text(text)
    with pytest.raises(InputError, match=says): load_benchmark(path)


def test_unknown_name(tmp_path):
    with pytest.raises(InputError, match="did you mean 'smoke-v1'"): load_benchmark("smoke")
    with pytest.raises(InputError, match="there is no benchmark file"): load_benchmark(tmp_path/"none.json")


def test_freezing_never_overwrites(tmp_path):
    smoke = load_benchmark("smoke-v1")
    path = freeze(smoke, tmp_path/"smoke-v1.json")
    before = path.read_bytes()
    assert freeze(smoke, path).read_bytes() == before
    other = smoke.model_copy(update={"validation": 33})
    with pytest.raises(InputError, match="raise the version of smoke-v1 instead"): freeze(other, path)
    assert path.read_bytes() == before


def test_freezing_after_a_changed_generator(tmp_path, monkeypatch):
    path = freeze(load_benchmark("smoke-v1"), tmp_path/"smoke-v1.json")
    linear_scale(monkeypatch)
    with pytest.raises(InputError, match="raise the version"): freeze(load_benchmark(path), path)


def test_copy_without_fingerprint(tmp_path):
    "A run's own copy holds the digest alone; it loads, and does not claim to be verified."
    smoke = load_benchmark("smoke-v1")
    path = tmp_path/"benchmark.json"
    path.write_text(json.dumps({"benchmark": smoke.to_dict(), "sha256": smoke.sha256()}))
    assert load_benchmark(path).sha256() == smoke.sha256() and not verify(path)["fingerprint_ok"]


def test_fingerprint_depends_on_seeds():
    smoke = load_benchmark("smoke-v1")
    other = smoke.model_copy(update={"seeds": smoke.seeds.model_copy(update={"train": 1})})
    a, b = fingerprint(smoke), fingerprint(other)
    assert a["sketches"]["train"] != b["sketches"]["train"] and a["sketches"]["validation"] == b["sketches"]["validation"]
