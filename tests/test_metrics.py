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
from causal_meta.datasets.graphs import enumerate_dags
from causal_meta.metrics.adjustment import adjustment_distances, sid
from causal_meta.metrics.against_exact import exact_metrics
from causal_meta.metrics.calibration import edge_entries, edge_metrics, reliability_curve
from causal_meta.metrics.cpdag import cpdag, cpdag_shd
from causal_meta.metrics.expectations import distinct, graph_metrics, graph_values
from causal_meta.metrics.pooled_calibration import counts_table, pooled_reliability, reliability_counts
from causal_meta.metrics.summary import METRICS, SUMMARY_METRICS, bootstrap_mean, bootstrap_ood, posterior_metrics, posterior_reliability, summarise
from causal_meta.metrics.uncertainty import edge_entropy, risk_metrics, uncertainty_metrics
from causal_meta.models.base import LOG_PROBS, Posterior, build_model, log_probs
from causal_meta.models.random import random_order_log_prob
from causal_meta.models.scores import equivalence_classes


def random_graph(rng, d, p, cyclic=False):
    "A DAG with shuffled labels, or any directed graph."
    mask = rng.random((d, d)) < p
    if cyclic: return torch.from_numpy(mask & ~np.eye(d, dtype=bool))
    order = rng.permutation(d)
    return torch.from_numpy(np.triu(mask, 1)[order][:, order])


def f1(claimed, true):
    if not claimed and not true: return 1.
    return 2*len(claimed & true)/(len(claimed) + len(true))


def reach(e, d):
    "The pairs (ancestor, descendant) of a set of edges, by Warshall's loop."
    above = set(e)
    for k, i, j in itertools.product(range(d), repeat=3):
        if (i, k) in above and (k, j) in above: above.add((i, j))
    return above


def compelled(e, d):
    "The edges of a DAG that point the same way in its whole class, by the labelling of Chickering (1995)."
    place = {v: r for r, v in enumerate(nx.topological_sort(nx.DiGraph(list(e)) if e else nx.DiGraph()))}
    parents = {v: {i for i, j in e if j == v} for v in range(d)}
    label = {}
    for x, y in sorted(e, key=lambda edge: (place[edge[1]], -place[edge[0]])):
        if (x, y) in label: continue
        into = {(p, y) for p in parents[y]}
        chain = [w for w in parents[x] if label[w, x]]
        if any(w not in parents[y] for w in chain):
            label.update(dict.fromkeys(into, True))
            continue
        for w in chain: label[w, y] = True
        strong = any(z != x and z not in parents[x] for z in parents[y])
        for edge in into: label.setdefault(edge, strong)
    return {edge for edge, fixed in label.items() if fixed}


def class_states(e, d):
    "The state of each pair in the completed PDAG."
    fixed = compelled(e, d)
    return [((i, j) in fixed, (j, i) in fixed, (i, j) in e or (j, i) in e) for i, j in itertools.combinations(range(d), 2)]


def brute_force(H, G):
    "Every metric of one graph that counts edges, by walking over nodes; None where undefined."
    d = len(G)
    edges = lambda A: {(i, j) for i, j in itertools.permutations(range(d), 2) if A[i, j]}
    h, g = edges(H.numpy()), edges(G.numpy())
    bones = lambda e: {frozenset(x) for x in e}
    state = lambda e, i, j: ((i, j) in e, (j, i) in e)
    wrong = [(state(h, i, j), state(g, i, j)) for i, j in itertools.combinations(range(d), 2) if state(h, i, j) != state(g, i, j)]
    common = bones(h) & bones(g)
    right = sum(state(h, *sorted(pair)) == state(g, *sorted(pair)) for pair in common)
    acyclic = all((i, i) not in reach(h, d) for i in range(d))
    return {"e_shd": len(wrong), "e_shd2": len(h ^ g), "e_f1": f1(h, g), "skeleton_f1": f1(bones(h), bones(g)),
            "ancestor_f1": f1(reach(h, d), reach(g, d)) if acyclic else None,
            "e_cpdag_shd": sum(a != b for a, b in zip(class_states(h, d), class_states(g, d))) if acyclic else None,
            "orientation_accuracy": right/len(common) if common else None,
            "missing": sum(not any(s) for s, _ in wrong), "extra": sum(not any(t) or all(s) for s, t in wrong),
            "reversed": sum(any(s) and any(t) and not all(s) for s, t in wrong)}


def wrong_effects(H, G):
    "The three adjustment distances by the paths between two nodes, one by one."
    d = len(G)
    h, g = ({(i, j) for i, j in itertools.permutations(range(d), 2) if A[i, j]} for A in (H.numpy(), G.numpy()))
    above_h, above_g = reach(h, d), reach(g, d)
    below = lambda v: {v} | {j for i, j in above_g if i == v}

    def paths(i, j, seen):
        if i == j: yield seen; return
        for v in range(d):
            if v not in seen and ((i, v) in g or (v, i) in g): yield from paths(v, j, (*seen, v))

    def is_open(path, Z):
        for a, v, b in zip(path, path[1:], path[2:]):
            if (a, v) in g and (b, v) in g:
                if not below(v) & Z: return False
            elif v in Z: return False
        return True

    def wrong(i, j, Z):
        if Z is None: return (i, j) in above_g
        found = list(paths(i, j, (i,)))
        causal = [p for p in found if all(e in g for e in itertools.pairwise(p))]
        if any(Z & below(v) for p in causal for v in p[1:]): return True
        return any(is_open(p, Z) for p in found if p not in causal)

    parents = lambda nodes: {p for p, v in h if v in nodes}
    between = lambda i, j: {v for v in range(d) if (i, v) in above_h and (v == j or (v, j) in above_h)}
    says = {"parent_aid": lambda i, j: None if (j, i) in h else parents({i}),
            "ancestor_aid": lambda i, j: {a for a, v in above_h if v == i} if (i, j) in above_h else None,
            "oset_aid": lambda i, j: parents(between(i, j)) - between(i, j) - {i} if (i, j) in above_h else None}
    return {name: sum(wrong(i, j, Z(i, j)) for i, j in itertools.permutations(range(d), 2)) for name, Z in says.items()}


NEED_A_DAG = ("e_cpdag_shd", "e_sid", "e_parent_aid", "e_ancestor_aid", "e_oset_aid")
PAIRS = [(seed, 3 + seed % 6) for seed in range(1000)]


def test_1000_pairs_of_dags_equal_brute_force_and_gadjid():
    as_int = lambda A: A.numpy().astype(np.int8)
    for seed, d in PAIRS:
        rng = np.random.default_rng(seed)
        H, G = random_graph(rng, d, rng.random()), random_graph(rng, d, rng.random())
        values = {name: v.item() for name, v in graph_values(H[None], G).items()}
        for name, expected in brute_force(H, G).items():
            if expected is None: assert math.isnan(values[name]), (name, seed)
            else: assert values[name] == pytest.approx(expected, abs=1e-12), (name, seed)
        for name in ("sid", "parent_aid", "ancestor_aid", "oset_aid"):
            normalised, mistakes = getattr(gadjid, name)(as_int(G), as_int(H), edge_direction="from row to column")
            assert values[f"e_{name}"] == mistakes and values[f"e_{name}_normalised"] == pytest.approx(normalised), (name, seed)
        assert values["e_shd"] == gadjid.shd(as_int(G), as_int(H))[1]
        assert values["missing"] + values["extra"] + values["reversed"] == values["e_shd"]
        assert values["missing"] + values["extra"] + 2*values["reversed"] == values["e_shd2"]
        if d > 4: continue
        for name, expected in wrong_effects(H, G).items(): assert values[f"e_{name}"] == expected, (name, seed)


def test_adjustment_distances_of_larger_graphs_equal_paths():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        H, G = random_graph(rng, 6, rng.random()*.8), random_graph(rng, 6, rng.random()*.6)
        values = adjustment_distances(H[None], G)
        for name, expected in wrong_effects(H, G).items(): assert values[name].item() == expected, (name, seed)


def edge_reference(p, y, k0):
    "Every metric of edge probabilities, in loops over the definitions."
    m, edges, others = len(p), [a for a, t in zip(p, y) if t], [a for a, t in zip(p, y) if not t]
    auroc = auprc = None
    if edges and others:
        auroc = sum((a > b) + (a == b)/2 for a in edges for b in others)/len(edges)/len(others)
        auprc = recall = 0.
        for cut in sorted(set(p), reverse=True):
            chosen = [t for a, t in zip(p, y) if a >= cut]
            auprc += (sum(chosen)/len(edges) - recall)*sum(chosen)/len(chosen)
            recall = sum(chosen)/len(edges)
    clip = lambda a: min(max(a, 1/(2*k0)), 1 - 1/(2*k0))
    log_prob = sum(math.log(clip(a) if t else 1 - clip(a)) for a, t in zip(p, y))
    ranked, bins = sorted((a, sum(t for b, t in zip(p, y) if b == a)/p.count(a)) for a in p), min(15, m)
    inside = [[e for r, e in enumerate(ranked) if r*bins//m == b] for b in range(bins)]
    wrong, sure = [(a >= .5) != t for a, t in zip(p, y)], [round(max(a, 1 - a), 6) for a in p]
    risk = lambda c: sum(w for w, s in zip(wrong, sure) if s >= c)/sum(s >= c for s in sure)
    aurc, best = sum(risk(c) for c in sure)/m, sorted(wrong)
    entropy = lambda *q: -sum(v*math.log(v) for v in q if v > 0)
    return {"auroc": auroc, "auprc": auprc, "brier": sum((a - t)**2 for a, t in zip(p, y))/m, "edge_log_prob": log_prob, "edge_log_prob_mean": log_prob/m,
            "ece": sum(abs(sum(a for a, _ in b) - sum(t for _, t in b)) for b in inside)/m, "edge_entropy": sum(entropy(a, 1 - a) for a in p)/m,
            "aurc": aurc, "aurc_excess": aurc - sum(sum(best[:k])/k for k in range(1, m + 1))/m}


def test_edge_probabilities_of_1000_tasks_equal_brute_force():
    for seed, d in PAIRS:
        rng = np.random.default_rng(seed)
        samples, G = torch.stack([random_graph(rng, d, rng.random(), cyclic=seed % 2 == 0) for _ in range(4)]), random_graph(rng, d, rng.random())
        log_weights = torch.from_numpy(rng.normal(size=4)) if seed % 3 else None
        posterior = Posterior.from_graphs(samples, log_weights)
        P, y = edge_entries(posterior.edge_probs, G)
        values = edge_metrics(posterior.edge_probs, G, 50) | risk_metrics(P, y) | uncertainty_metrics(posterior)
        w, states = posterior.weights.tolist(), 0.
        for i, j in itertools.combinations(range(d), 2):
            mass = {}
            for v, A in zip(w, samples.numpy()): mass[A[i, j], A[j, i]] = mass.get((A[i, j], A[j, i]), 0.) + v
            states -= sum(v*math.log(v) for v in mass.values())
        expected = edge_reference(P.tolist(), y.tolist(), 50) | {"pair_entropy": states/(d*(d - 1)/2), "effective_sample_size": 1/sum(v*v for v in w)}
        assert values.keys() == expected.keys()
        for name, value in expected.items(): assert values[name] == (None if value is None else pytest.approx(value, abs=1e-9)), (name, seed)


def test_a_class_has_one_cpdag_and_two_classes_have_two():
    for d in (2, 3, 4):
        dags = enumerate_dags(d)
        same = equivalence_classes(dags)[:, None] == equivalence_classes(dags)
        assert torch.equal(cpdag_shd(dags[:, None], dags) == 0, same)
        assert torch.equal(cpdag(dags), torch.stack([dags[members].any(0) for members in same]))
    for seed in range(200):
        d = 5 + seed % 8
        G = random_graph(np.random.default_rng(seed), d, .1 + .4*(seed % 3))
        e = {tuple(x) for x in G.nonzero().tolist()}
        expected = e | {(j, i) for i, j in e - compelled(e, d)}
        assert {tuple(x) for x in cpdag(G).nonzero().tolist()} == expected, seed


def test_a_reversal_that_stays_in_the_class_costs_no_cpdag_distance():
    "An edge i -> j is covered, and may be turned, if j has the parents of i and i (Chickering, 1995)."
    turned = 0
    for seed in range(200):
        G = random_graph(np.random.default_rng(seed), 6, .5)
        for i, j in G.nonzero().tolist():
            if not torch.equal(G[:, j], G[:, i] | (torch.arange(6) == i)): continue
            H = G.clone()
            H[i, j], H[j, i] = False, True
            assert cpdag_shd(H, G) == 0 and torch.equal(cpdag(H), cpdag(G))
            turned += 1
    assert turned > 100


def test_metrics_that_need_no_dag_equal_brute_force_on_cyclic_graphs():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        H, G = random_graph(rng, 4, .5, cyclic=True), random_graph(rng, 4, .5)
        values = {name: v.item() for name, v in graph_values(H[None], G).items()}
        expected = brute_force(H, G)
        for name in ("e_shd", "e_shd2", "e_f1", "skeleton_f1", "missing", "extra", "reversed"):
            assert values[name] == pytest.approx(expected[name], abs=1e-12), (name, seed)
        if not nx.is_directed_acyclic_graph(nx.DiGraph(H.numpy().astype(int))):
            for name in ("ancestor_f1", *NEED_A_DAG): assert math.isnan(values[name]), (name, seed)


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
    log_weights = torch.from_numpy(rng.normal(size=8))
    before = posterior_metrics(Posterior(probs, samples, log_weights, info={"log_prob": "bernoulli"}), G, 50)
    after = posterior_metrics(Posterior(relabel(probs), relabel(samples), log_weights, info={"log_prob": "bernoulli"}), relabel(G), 50)
    for name in before: assert after[name] == (None if before[name] is None else pytest.approx(before[name], abs=1e-9)), name


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
    distances = ("e_shd", "e_shd2", *NEED_A_DAG)
    zero = (*distances, *(f"{name}_normalised" for name in distances), "missing", "extra", "reversed", "brier", "ece", "edge_entropy", "pair_entropy", "aurc", "aurc_excess")
    one = ("e_f1", "skeleton_f1", "ancestor_f1", "valid_dag_rate", "n_distinct_graphs")
    assert metrics["effective_sample_size"] == pytest.approx(7)
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


def exact_of(data, n_samples=50):
    return build_model("exact").posterior(data, n_samples=n_samples, generator=torch.Generator().manual_seed(0))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_distances_to_the_exact_posterior(seed, d):
    "Zero for itself, equal to loops over all DAGs for another, and unchanged when nodes are renamed."
    g = torch.Generator().manual_seed(seed)
    data = torch.randn(20, d, generator=g)@torch.randn(d, d, generator=g)
    exact, order = exact_of(data), torch.randperm(d, generator=g)
    renamed = exact_of(data[:, order])
    dags, truth = enumerate_dags(d), exact.graphs[0]
    itself = exact_metrics(exact, exact, truth)
    for name in ("exact_error", "exact_error_max", "exact_dag_tv", "exact_log_prob_gap"): assert itself[name] == pytest.approx(0, abs=1e-12), name
    probs = torch.rand(d, d, generator=g).fill_diagonal_(0)
    samples = torch.rand(40, d, d, generator=g) < probs
    p = [math.exp(exact.log_prob(A)) for A in dags]
    for form in ("bernoulli", None):
        found = exact_metrics(Posterior(probs, samples, info={"log_prob": form}), exact, truth)
        if form: q = [math.prod(float(probs[i, j] if A[i, j] else 1 - probs[i, j]) for i, j in itertools.permutations(range(d), 2)) for A in dags]
        else: q = [sum(torch.equal(A, B) for B in samples)/40 for A in dags]
        assert found["exact_dag_tv"] == pytest.approx((sum(abs(a - b) for a, b in zip(q, p)) + 1 - sum(q))/2, abs=1e-6)
        gap = math.log(p[int((dags == truth).all((1, 2)).int().argmax())]/q[int((dags == truth).all((1, 2)).int().argmax())]) if form else None
        assert found["exact_log_prob_gap"] == (pytest.approx(gap, abs=1e-4) if form else None)
        relabel = lambda A: A[..., order, :][..., order]
        again = exact_metrics(Posterior(relabel(probs), relabel(samples), info={"log_prob": form}), renamed, relabel(truth))
        for name, value in found.items(): assert again[name] == (None if value is None else pytest.approx(value, abs=1e-5)), name


@pytest.mark.parametrize("name", ["bernoulli", "local_scores", "permutation_mixture", "random_order", "uniform"])
def test_a_closed_form_takes_graphs_in_any_batch(name):
    d, g = 3, torch.Generator().manual_seed(0)
    assert LOG_PROBS["random_order"] is random_order_log_prob
    scores = torch.randn(d, 2**d, generator=g).double()
    parameters = {"local_scores": scores, "log_normaliser": torch.tensor(1.), "positions": torch.tensor([[0, 1, 2], [2, 0, 1]]),
                  "edge_logits": torch.randn(d, d, generator=g), "p": torch.tensor(.3), "log_count": torch.tensor(25.).log()}
    posterior = Posterior(torch.full((d, d), .4).fill_diagonal_(0), None, None, parameters, {"log_prob": name})
    off = ~torch.eye(d, dtype=torch.bool)
    graphs = torch.zeros(64, d, d, dtype=torch.bool)
    graphs[:, off] = (torch.arange(64)[:, None] >> torch.arange(6)) % 2 == 1
    together = log_probs(posterior, graphs.view(4, 16, d, d))
    assert together.shape == (4, 16) and together.dtype == torch.float64
    one_by_one = [posterior.log_prob(A) for A in graphs]
    assert together.flatten().tolist() == pytest.approx(one_by_one, abs=1e-12)
    if name != "local_scores": assert together.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_pooling_does_not_depend_on_how_entries_are_split():
    rng = np.random.default_rng(0)
    p, y = torch.from_numpy(rng.beta(.3, 1., size=3000)), torch.from_numpy(rng.random(3000) < .3)
    whole = reliability_counts(p, y)
    for parts in (2, 7, 500):
        split = [reliability_counts(a, b) for a, b in zip(p.chunk(parts), y.chunk(parts))]
        assert counts_table(split).sum(0).flatten().tolist() == pytest.approx(counts_table([whole])[0].flatten().tolist(), abs=1e-6)
        assert pooled_reliability(split).ece == pytest.approx(pooled_reliability([whole]).ece, abs=1e-8)
    assert abs(pooled_reliability([whole]).ece - reliability_curve(p, y).ece) < .005


def test_the_doubt_of_one_family_detects_nothing_and_that_of_another_does():
    rng, values = np.random.default_rng(0), []
    for _ in range(50): values.append(bootstrap_ood(rng.beta(2, 5, 40), rng.beta(2, 5, 40)))
    assert np.mean([v["mean"] for v in values]) == pytest.approx(.5, abs=.03)
    assert np.mean([v["low"] <= .5 <= v["high"] for v in values]) > .85
    assert bootstrap_ood(rng.beta(2, 5, 40), rng.beta(5, 2, 40))["low"] > .8


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
        assert all(metrics[name] is None for name in ("ancestor_f1", *NEED_A_DAG)) and metrics["e_shd"] == 1
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


def test_records_with_counts_follow_their_schemas_and_give_summaries_of_them(tmp_path):
    records = records_of()
    for r in records: r["reliability"] = posterior_reliability(Posterior(torch.full((4, 4), r["index"]/4).fill_diagonal_(0)), torch.ones(4, 4).triu(1).bool())
    valid("metrics_raw", {"schema": 1, "records": records})
    summary = run_dir(tmp_path, records) | {"models": summarise(records, id_families=["id/linear_er"])}
    valid("metrics_summary", summary)
    found = summary["models"]["random"]["id/linear_er"]
    assert found.keys() == METRICS.keys() | SUMMARY_METRICS.keys()
    assert found["ece_pooled"]["n"] == found["ood_auroc"]["n"] == 3 and found["ood_auroc"]["mean"] == .5
    assert found["ece_pooled"]["mean"] == pytest.approx(abs(0 - .5)/3 + abs(.25 - .5)/3)  # probabilities 0, 1/4, 1/2, and half of the entries are edges
    assert summarise(records[::-1], id_families=["id/linear_er"])["random"] == summary["models"]["random"]


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
