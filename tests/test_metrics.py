"What the metric notebooks cannot show by example: agreement with brute force at length, and properties under random inputs."
import itertools
import json
import math
from importlib.resources import files

import gadjid
import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError

from causal_meta.analysis.collect import collect, to_records
from causal_meta.analysis.tables import summary_table
from causal_meta.datasets.validation import InputError
from causal_meta.metrics.adjustment import sid
from causal_meta.metrics.calibration import edge_metrics
from causal_meta.metrics.expectations import distinct, graph_metrics, graph_values
from causal_meta.metrics.summary import METRICS, bootstrap_mean, posterior_metrics, summarise
from causal_meta.metrics.uncertainty import edge_entropy
from causal_meta.models.base import Posterior


def random_graph(rng, d, p, cyclic=False):
    "A DAG with shuffled labels, or any directed graph."
    mask = rng.random((d, d)) < p
    if cyclic: return torch.from_numpy(mask & ~np.eye(d, dtype=bool))
    order = rng.permutation(d)
    return torch.from_numpy(np.triu(mask, 1)[order][:, order])


def f1(claimed, true):
    if not claimed and not true: return 1.
    return 2*len(claimed & true)/(len(claimed) + len(true))


def brute_force(H, G):
    "Every metric of one graph, by walking over nodes; None where undefined."
    d = len(G)
    edges = lambda A: {(i, j) for i, j in itertools.permutations(range(d), 2) if A[i, j]}
    h, g = edges(H), edges(G)
    nodes = lambda e: nx.DiGraph([*e]) if e else nx.DiGraph()
    above = lambda e: {(i, j) for i in nodes(e) for j in nx.descendants(nodes(e), i)}
    bones = lambda e: {frozenset(x) for x in e}
    state = lambda e, i, j: ((i, j) in e, (j, i) in e)
    wrong = [(state(h, i, j), state(g, i, j)) for i, j in itertools.combinations(range(d), 2) if state(h, i, j) != state(g, i, j)]
    common = bones(h) & bones(g)
    right = sum(state(h, *sorted(pair)) == state(g, *sorted(pair)) for pair in common)
    return {"e_shd": len(wrong), "e_shd2": len(h ^ g), "e_f1": f1(h, g), "skeleton_f1": f1(bones(h), bones(g)), "ancestor_f1": f1(above(h), above(g)),
            "orientation_accuracy": right/len(common) if common else None,
            "missing": sum(not any(s) for s, _ in wrong), "extra": sum(not any(t) or all(s) for s, t in wrong),
            "reversed": sum(any(s) and any(t) and not all(s) for s, t in wrong)}


PAIRS = [(seed, 2 + seed % 5) for seed in range(300)]


def test_300_pairs_of_dags_equal_brute_force_and_gadjid():
    for seed, d in PAIRS:
        rng = np.random.default_rng(seed)
        H, G = random_graph(rng, d, rng.random()), random_graph(rng, d, rng.random())
        values = {name: v.item() for name, v in graph_values(H[None], G).items()}
        for name, expected in brute_force(H, G).items():
            if expected is None: assert math.isnan(values[name]), (name, seed)
            else: assert values[name] == pytest.approx(expected, abs=1e-12), (name, seed)
        as_int = lambda A: A.numpy().astype(np.int8)
        normalised, mistakes = gadjid.sid(as_int(G), as_int(H), edge_direction="from row to column")
        assert values["e_sid"] == mistakes and values["e_sid_normalised"] == pytest.approx(normalised)
        assert values["e_shd"] == gadjid.shd(as_int(G), as_int(H))[1]
        assert values["missing"] + values["extra"] + values["reversed"] == values["e_shd"]
        assert values["missing"] + values["extra"] + 2*values["reversed"] == values["e_shd2"]


def test_metrics_that_need_no_dag_equal_brute_force_on_cyclic_graphs():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        H, G = random_graph(rng, 4, .5, cyclic=True), random_graph(rng, 4, .5)
        values = {name: v.item() for name, v in graph_values(H[None], G).items()}
        expected = brute_force(H, G)
        for name in ("e_shd", "e_shd2", "e_f1", "skeleton_f1", "missing", "extra", "reversed"):
            assert values[name] == pytest.approx(expected[name], abs=1e-12), (name, seed)
        if not nx.is_directed_acyclic_graph(nx.DiGraph(H.numpy().astype(int))):
            assert math.isnan(values["e_sid"]) and math.isnan(values["ancestor_f1"])


def test_expectations_equal_a_weighted_loop_over_samples():
    rng = np.random.default_rng(3)
    G = random_graph(rng, 5, .5)
    samples = torch.stack([random_graph(rng, 5, .4) for _ in range(25)])
    log_weights = torch.from_numpy(rng.normal(size=25))
    w = (log_weights.exp()/log_weights.exp().sum()).tolist()
    metrics = graph_metrics(samples, log_weights, G)
    each = [brute_force(H, G) for H in samples]
    for name in each[0]:
        defined = [(wk, e[name]) for wk, e in zip(w, each) if e[name] is not None]
        assert metrics[name] == pytest.approx(sum(wk*v for wk, v in defined)/sum(wk for wk, _ in defined), abs=1e-9), name


tasks = st.tuples(st.integers(0, 10**6), st.integers(2, 7), st.floats(0, 1), st.booleans())


@settings(max_examples=60, deadline=None)
@given(tasks)
def test_names_of_nodes_carry_no_meaning(task):
    seed, d, p, cyclic = task
    rng = np.random.default_rng(seed)
    G, samples = random_graph(rng, d, p), torch.stack([random_graph(rng, d, .4, cyclic) for _ in range(8)])
    order = torch.from_numpy(rng.permutation(d))
    relabel = lambda A: A[..., order, :][..., order]
    probs = torch.from_numpy(rng.integers(0, 5, size=(d, d))/4).fill_diagonal_(0)  # many ties
    before = graph_metrics(samples, None, G) | edge_metrics(probs, G, 50)
    after = graph_metrics(relabel(samples), None, relabel(G)) | edge_metrics(relabel(probs), relabel(G), 50)
    for name in before: assert after[name] == pytest.approx(before[name], abs=1e-9), name


@settings(max_examples=40, deadline=None)
@given(tasks)
def test_order_of_samples_and_scale_of_weights_change_nothing(task):
    seed, d, p, cyclic = task
    rng = np.random.default_rng(seed)
    G, samples = random_graph(rng, d, p), torch.stack([random_graph(rng, d, .4, cyclic) for _ in range(8)])
    log_weights, order = torch.from_numpy(rng.normal(size=8)), torch.from_numpy(rng.permutation(8))
    before, after = graph_metrics(samples, log_weights, G), graph_metrics(samples[order], log_weights[order] - 300, G)
    for name in before: assert after[name] == pytest.approx(before[name], abs=1e-9), name


@settings(max_examples=40, deadline=None)
@given(tasks)
def test_a_perfect_posterior_gets_the_perfect_value(task):
    seed, d, p, _ = task
    G = random_graph(np.random.default_rng(seed), d, p)
    metrics = posterior_metrics(Posterior.from_graphs(G.repeat(7, 1, 1)), G, 100)
    zero = ("e_shd", "e_shd2", "e_sid", "e_shd_normalised", "e_shd2_normalised", "e_sid_normalised", "missing", "extra", "reversed", "brier", "ece", "edge_entropy")
    one = ("e_f1", "skeleton_f1", "ancestor_f1", "valid_dag_rate", "n_distinct_graphs")
    for name in zero: assert metrics[name] == pytest.approx(0, abs=1e-12), name
    for name in one: assert metrics[name] == pytest.approx(1), name
    for name in ("orientation_accuracy", "auroc", "auprc"): assert metrics[name] == (1 if G.any() else None), name
    assert metrics["edge_log_prob"] == pytest.approx(d*(d - 1)*math.log(1 - 1/200))


@settings(max_examples=30, deadline=None)
@given(tasks)
def test_the_diagonal_never_counts(task):
    seed, d, p, _ = task
    rng = np.random.default_rng(seed)
    G, samples, probs = random_graph(rng, d, p), torch.stack([random_graph(rng, d, .4) for _ in range(4)]), torch.from_numpy(rng.random((d, d)))
    eye = torch.eye(d, dtype=torch.bool)
    assert graph_metrics(samples | eye, None, G) == graph_metrics(samples, None, G | eye) == graph_metrics(samples, None, G)
    assert edge_metrics(probs.masked_fill(eye, 1), G, 9) == edge_metrics(probs.masked_fill(eye, 0), G | eye, 9)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_bounds(seed):
    rng = np.random.default_rng(seed)
    d = int(rng.integers(2, 8))
    G, samples = random_graph(rng, d, rng.random()), torch.stack([random_graph(rng, d, rng.random(), bool(rng.integers(2))) for _ in range(6)])
    metrics = graph_metrics(samples, None, G) | edge_metrics(samples.double().mean(0), G, 6)
    for name, value in metrics.items():
        if value is None or METRICS[name].unit != "1": continue
        assert -1e-12 <= value <= 1 + 1e-12, name
    assert metrics["e_shd"] <= metrics["e_shd2"] <= 2*metrics["e_shd"] + 1e-9
    assert edge_entropy(samples.double().mean(0)) <= math.log(2) + 1e-9


def test_distinct_keeps_the_graphs_and_their_mass():
    rng = np.random.default_rng(0)
    graphs = torch.stack([random_graph(rng, 3, .5) for _ in range(200)])
    kinds, mass = distinct(graphs, torch.full((200,), 1/200))
    assert len(kinds) == len({tuple(g.flatten().tolist()) for g in graphs}) and mass.sum().item() == pytest.approx(1)
    for kind, weight in zip(kinds, mass): assert weight.item() == pytest.approx((graphs == kind).all((1, 2)).double().mean().item(), abs=1e-6)


def test_all_cyclic_and_cyclic_truth_are_undefined_not_scored():
    cycle = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0]]).bool()
    chain = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()
    assert graph_metrics(cycle[None], None, chain)["valid_dag_rate"] == 0
    for H, G in ((cycle, chain), (chain, cycle)):
        metrics = graph_metrics(H[None], None, G)
        assert metrics["e_sid"] is None and metrics["ancestor_f1"] is None and metrics["e_shd"] == 1
    assert sid(chain[None], cycle).isnan().all()


def test_one_node_and_wrong_shapes_are_one_sentence():
    one = torch.zeros(1, 1).bool()
    with pytest.raises(InputError, match="at least 2 nodes"): graph_metrics(one[None], None, one)
    with pytest.raises(InputError, match="K of at least 1"): graph_metrics(torch.zeros(0, 3, 3).bool(), None, torch.zeros(3, 3).bool())
    with pytest.raises(InputError, match="nan or outside"): edge_metrics(torch.full((3, 3), math.nan), torch.zeros(3, 3).bool(), 10)


def test_global_generators_are_left_alone():
    torch.manual_seed(0); np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), np.random.get_state()[2]
    G = random_graph(np.random.default_rng(0), 5, .5)
    posterior_metrics(Posterior.from_graphs(G.repeat(3, 1, 1)), G, 10); bootstrap_mean([1., 2., 3.])
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all() and before[2] == np.random.get_state()[2]


# files

SCHEMAS = {name: json.loads((files("causal_meta")/"schemas"/f"{name}.schema.json").read_text()) for name in ("metrics_raw", "metrics_summary")}


def valid(name, content):
    Draft202012Validator(SCHEMAS[name]).validate(json.loads(json.dumps(content, allow_nan=False)))


def records_of(models=("avici", "random"), tasks=3):
    rng, out = np.random.default_rng(0), []
    for index in range(tasks):
        G = random_graph(rng, 4, .5)
        for model in models:
            posterior = Posterior.from_graphs(torch.stack([random_graph(rng, 4, .4) for _ in range(5)]))
            out.append({"model": model, "training_seed": None if model == "random" else 0, "seed_list": "a", "family": "id/linear_er", "index": index,
                        "metrics": posterior_metrics(posterior, G, 5),
                        "compute": {"seconds": .1, "cpu_seconds": .1, "peak_rss_bytes": 10**8, "peak_device_bytes": 0, "optimiser_steps": None, "tasks_seen": None,
                                    "posterior_samples": 5, "stopped_by": None}})
    return out


def run_dir(path, records, sha256="0"*64):
    results = path/"results"
    results.mkdir(parents=True)
    summary = {"schema": 1, "benchmark": {"name": "smoke-v1", "version": 1, "sha256": sha256}, "models": summarise(records)}
    (results/"metrics_raw.json").write_text(json.dumps({"schema": 1, "records": records}))
    (results/"metrics_summary.json").write_text(json.dumps(summary))
    return summary


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_schemas(name):
    Draft202012Validator.check_schema(SCHEMAS[name])


def test_results_follow_their_schemas(tmp_path):
    records = records_of()
    valid("metrics_raw", {"schema": 1, "records": records})
    valid("metrics_summary", run_dir(tmp_path, records))
    assert to_records(collect(tmp_path)) == records
    for metric in summarise(records)["random"]["id/linear_er"]: assert metric in METRICS


@pytest.mark.parametrize("change", [
    lambda r: r.update(extra=1), lambda r: r.pop("seed_list"), lambda r: r.update(index=-1), lambda r: r.update(training_seed="0"),
    lambda r: r["metrics"].update({"E-SHD": 1.}), lambda r: r["metrics"].update(auroc="high"), lambda r: r["compute"].update(hours=1),
    lambda r: r["compute"].update(seconds=-1), lambda r: r["compute"].update(stopped_by="boredom")])
def test_a_record_with_a_mistake_is_refused(change):
    record = records_of(tasks=1)[0]
    change(record)
    with pytest.raises(ValidationError): valid("metrics_raw", {"schema": 1, "records": [record]})


@pytest.mark.parametrize("change", [
    lambda s: s.update(date="today"), lambda s: s["benchmark"].update(sha256="abc"), lambda s: s.update(schema=2),
    lambda s: s["models"]["avici"]["id/linear_er"]["auroc"].pop("n"), lambda s: s["models"]["avici"]["id/linear_er"]["auroc"].update(sd=1.)])
def test_a_summary_with_a_mistake_is_refused(change, tmp_path):
    summary = run_dir(tmp_path, records_of())
    change(summary)
    with pytest.raises(ValidationError): valid("metrics_summary", summary)


def test_runs_of_different_benchmarks_are_not_mixed(tmp_path):
    run_dir(tmp_path/"one", records_of(["avici"])); run_dir(tmp_path/"two", records_of(["bcnp"]), sha256="1"*64); run_dir(tmp_path/"three", records_of(["bcnp"]))
    with pytest.raises(InputError, match="same benchmark digest"): collect([tmp_path/"one", tmp_path/"two"])
    frame = collect([tmp_path/"one", tmp_path/"three"])
    assert sorted(frame["model"].unique()) == ["avici", "bcnp"] and len(frame) == 6


def test_tables_and_plots_read_what_evaluation_writes(tmp_path):
    import matplotlib.pyplot as plt

    from causal_meta.analysis.plots import STYLE, plot_edge_heatmap, plot_graph, plot_metric
    summary = run_dir(tmp_path, records_of())
    table = summary_table(summary)
    assert {"e_shd ↓", "auroc ↑"} <= set(table.header) and len(table.rows) == 2
    for text in (table.to_text(), table.to_markdown(), table.to_latex(), table.to_csv()): assert "avici" in text
    settings_before = {k: plt.rcParams[k] for k in STYLE}
    for results in (summary, collect(tmp_path)): plot_metric(results, "e_shd")
    probs = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    plot_edge_heatmap(probs, truth=probs > .8); plot_graph(probs, threshold=2.); plot_graph(probs, list("abcde"), truth=probs > .8)
    assert settings_before == {k: plt.rcParams[k] for k in STYLE}
    plt.close("all")
