"Diagnostics and distances do not depend on the names of nodes, agree with brute force, and are zero where nothing differs."
from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from causal_meta.datasets.diagnostics import (
    check_family, predictability, r2_sortability, resample, signal, sortability, standardised, twin_correlation, varsortability)
from causal_meta.datasets.distances import (
    PROPERTIES, clustering, degree_counts, degree_divergence, describe, distance, in_distribution, jensen_shannon, nearest, nonlinearity,
    shifted_factors, spectral_gap, split_tasks, structural_overlap, twin_kurtosis, zero)
from causal_meta.datasets.graphs import ErdosRenyi, relabel
from causal_meta.datasets.mechanisms import Linear, NeuralNet
from causal_meta.datasets.randomness import TaskStreams
from causal_meta.datasets.schema import TestFamily, TrainMixture
from causal_meta.datasets.scm import SCMFamily
from causal_meta.datasets.streams import standardise
from causal_meta.datasets.validation import InputError

quick = settings(max_examples=40, deadline=None, derandomize=True)
ER = {"type": "er", "edges_per_node": 1}


def streams(*indices, seed=0): return TaskStreams(seed, "test", "diagnostics", indices)


@st.composite
def tables(draw, rows=30):
    "A few graphs with data of few distinct values (so that there are ties), and a renaming of nodes for each."
    B, d, seed = draw(st.integers(1, 4)), draw(st.integers(2, 7)), draw(st.integers(0, 10**6))
    s = streams(*range(B), seed=seed)
    graphs = ErdosRenyi(p=draw(st.floats(0, 1))).sample(s, d)
    data = s.normal("noise/train", (rows, d)) + graphs.any(1)[:, None]*s.normal("noise/test", (rows, 1))
    if draw(st.booleans()): data = data.round()
    return graphs, data, s.permutation("graph/order", d)


def renamed(graphs, data, order): return relabel(graphs, order), data.gather(2, order[:, None].expand_as(data))


@quick
@given(tables())
def test_names_of_nodes_do_not_matter(case):
    graphs, data, order = case
    others, moved = renamed(*case)
    per_task = {"varsortability": varsortability, "r2_sortability": r2_sortability}
    for name, f in per_task.items(): torch.testing.assert_close(f(moved, others), f(data, graphs), rtol=0, atol=1e-9, equal_nan=True, msg=name)
    for f in (spectral_gap, clustering): torch.testing.assert_close(f(others), f(graphs), rtol=0, atol=1e-9)
    torch.testing.assert_close(predictability(moved), predictability(data).gather(1, order), rtol=0, atol=1e-8)
    assert degree_divergence(others, graphs) == 0
    twin = data.flip(1)
    for f in (twin_correlation, twin_kurtosis):
        torch.testing.assert_close(f(moved, moved.flip(1), others), f(data, twin, graphs).gather(1, order), rtol=0, atol=1e-9, equal_nan=True)


@quick
@given(tables())
def test_sortability_by_brute_force(case):
    graphs, data, _ = case
    scores = data.double().var(1)
    for A, s, found in zip(graphs, scores, sortability(scores, graphs, 1e-12)):
        G, met = nx.DiGraph(A.int().numpy()), set()
        for i in G:
            for path in nx.all_simple_paths(G, i, [j for j in G if j != i]): met.add((i, path[-1], len(path)))
        if not met: assert found.isnan(); continue
        expected = np.mean([1. if s[i] < s[j] and not math.isclose(s[i], s[j], rel_tol=1e-12) else .5*math.isclose(s[i], s[j], rel_tol=1e-12) for i, j, _ in met])
        assert math.isclose(found, expected, abs_tol=1e-12)


@quick
@given(tables())
def test_predictability_by_least_squares(case):
    _, data, _ = case
    for x, found in zip(data.double().numpy(), predictability(data)):
        x = x - x.mean(0)
        for j in range(x.shape[1]):
            others = np.delete(x, j, 1)
            left = x[:, j] - others @ np.linalg.lstsq(others, x[:, j], rcond=None)[0]
            expected = 1 - left.var()/x[:, j].var() if x[:, j].var() > 1e-12 else 0.
            assert abs(found[j] - expected) < 1e-6


@quick
@given(tables(), st.floats(.01, 100))
def test_units_do_not_matter_once_standardised(case, scale):
    graphs, data, _ = case
    units = scale*torch.arange(1., data.shape[2] + 1)
    data = data[:, :, :] + 1e-3*torch.linspace(-1, 1, data.shape[1])[None, :, None]  # no constant column
    some = graphs.any((1, 2))
    for z in (standardised(units*data + scale), standardise(units*data + scale)[0]):
        assert (varsortability(z, graphs)[some] == .5).all()
        torch.testing.assert_close(predictability(z), predictability(data), rtol=0, atol=1e-3)


@quick
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_jensen_shannon_agrees_with_scipy(pairs):
    p, q = torch.tensor(pairs, dtype=torch.float64).T
    p[0] += 1; q[-1] += 1
    assert math.isclose(jensen_shannon(p, q).item(), jensenshannon(p.numpy(), q.numpy())**2, abs_tol=1e-10)
    assert math.isclose(jensen_shannon(p, q), jensen_shannon(q, p), abs_tol=1e-15)
    assert jensen_shannon(p, p) == 0


@quick
@given(tables(), tables())
def test_degree_divergence_is_symmetric_and_bounded(a, b):
    if a[0].shape[-1] != b[0].shape[-1]:
        with pytest.raises(InputError, match="distances are measured at the same number"): degree_divergence(a[0], b[0])
        return
    there = degree_divergence(a[0], b[0])
    assert math.isclose(there, degree_divergence(b[0], a[0]), abs_tol=1e-15) and 0 <= there <= math.log(2) + 1e-12
    assert (degree_counts(a[0]).sum(2) == a[0].shape[-1]).all()


def test_nonlinearity_does_not_depend_on_names_nor_on_other_tasks():
    models = SCMFamily(graph=ER, mechanism=NeuralNet()).sample(streams(*range(6)), 7)
    data, order = models.sample(120), streams(*range(6)).permutation("graph/order", 7)
    gap = nonlinearity(models.graphs, data)
    others, moved = renamed(models.graphs, data, order)
    torch.testing.assert_close(nonlinearity(others, moved), gap.gather(1, order), rtol=0, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(nonlinearity(models.graphs[2:4], data[2:4]), gap[2:4], rtol=0, atol=1e-6, equal_nan=True)
    assert nonlinearity(models.graphs & False, data).isnan().all()


@pytest.mark.parametrize("standardise", ["internal", "post", "none"])
def test_twins_keep_parents_and_draw_noise_anew(standardise):
    models = SCMFamily(graph=ER, mechanism=Linear(), standardise=standardise).sample(streams(*range(5)), 6)
    x = models.sample(400)
    spread = x.std(1, keepdim=True)
    torch.testing.assert_close(resample(models, x, "noise/train")/spread, x/spread, rtol=0, atol=1e-3)
    share = signal(models, 4000)
    assert torch.equal(share.isnan(), ~models.graphs.any(1))
    explained = 1 - (models.params[0]["scale"]/models.sd)**2
    assert (share - explained)[models.graphs.any(1)].abs().mean() < .05


def test_a_family_without_edges_has_nothing_to_carry():
    found = check_family(SCMFamily(graph={"type": "er", "p": 0}, mechanism=Linear()), 4, tasks=5, n=100)
    assert found["passes"] and math.isnan(found["signal"]) and math.isnan(found["varsortability"])


MIXTURE = TrainMixture(families={"a": {"weight": 3., "scm": {"graph": ER, "mechanism": {"type": "linear"}}},
                                 "b": {"scm": {"graph": {"type": "sf", "m": 1}, "mechanism": {"type": "neural_net"}}}}, d=(6, 10), n=(100, 200))


def test_descriptions_are_functions_of_the_task_and_have_distance_zero_from_themselves():
    whole, part = describe(MIXTURE, 6, 100, tasks=12), describe(MIXTURE, 6, 100, tasks=5)
    assert whole["family"].bincount(minlength=2).min() >= 1 and torch.equal(whole["family"][:5], part["family"])
    for what in PROPERTIES: torch.testing.assert_close(whole[what][:5], part[what], rtol=0, atol=1e-6, equal_nan=True)
    limits = zero(whole, splits=3)
    assert all(numbers["distance"] == 0 for numbers in distance(whole, whole, limits).values())
    there, back = distance(part, whole, limits), distance(whole, part, limits)
    assert all(math.isclose(there[what]["distance"], back[what]["distance"], abs_tol=1e-12) for what in PROPERTIES)
    for k in (0, 1): assert all(nearest(what, whole[what][whole["family"] == k], whole[what], whole["family"]) == 0 for what in PROPERTIES)
    shares = [len(at)/2000 for _, at in split_tasks(MIXTURE, streams(*range(2000)))]
    assert abs(shares[0] - .75) < .03


def family(d=10, n=200, graph=ER, rows=None, **scm):
    return TestFamily(scm={"graph": graph, **({"mechanism": {"type": "linear"}} | scm)}, d=d, n=n, factor="?", why="?", interventional_rows=rows)


@pytest.mark.parametrize("changes, expected", [
    ({}, []),
    ({"graph": {"type": "sf", "m": 1, "hub": "out"}}, []),  # linear on sf: a new combination of known levels
    ({"graph": {"type": "er", "exact_edges": 10}}, []),
    ({"graph": {"type": "er", "exact_edges": 11}}, ["graph"]),
    ({"graph": {"type": "mixture", "components": [{"weight": .5, "graph": ER}, {"weight": .5, "graph": {"type": "ws", "k": 2}}]}}, ["graph"]),
    ({"mechanism": {"type": "linear", "weight_scale": 5}}, ["mechanism"]),
    ({"noise": "laplace", "n": 5000}, ["noise", "samples"]),
    ({"d": 5}, ["nodes"]),
    ({"rows": {"tasks": 1.}}, ["interventional rows"]),
])
def test_factors_by_configuration(changes, expected):
    assert shifted_factors(MIXTURE, family(**changes)) == expected
    assert in_distribution(MIXTURE, family(**changes)) == (not expected)


def test_every_family_of_a_mixture_is_in_its_distribution():
    for one in MIXTURE.families.values():
        for d in MIXTURE.d:
            for n in MIXTURE.n: assert in_distribution(MIXTURE, TestFamily(scm=one.scm, d=d, n=n, factor="?", why="?"))


def test_structural_overlap_knows_renamed_graphs():
    s = streams(*range(50))
    A = ErdosRenyi(edges_per_node=2).sample(s, 12)
    assert structural_overlap(relabel(A, s.permutation("graph/places", 12)), A).share == 1
    assert structural_overlap(A[:25], A[25:]).share == 0
    share, reason = structural_overlap(A[:, :7, :7], A[:, :7, :7])
    assert share is None and "7 nodes" in reason
