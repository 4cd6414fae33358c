"""Properties of the local scores and of the exact and random posteriors that hold for every data set."""
from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from causal_meta.datasets.bge_linear import BGeLinear
from causal_meta.datasets.graphs import Graph, enumerate_dags, is_dag
from causal_meta.datasets.randomness import TaskStreams
from causal_meta.datasets.scm import SCMFamily
from causal_meta.datasets.validation import InputError
from causal_meta.models.base import Budget, build_model
from causal_meta.models.exact import class_probs, dag_classes, exact_posterior, sample_graphs
from causal_meta.models.random import random_dags
from causal_meta.models.scores import LOCAL_SCORES, bge_local_scores, equivalence_classes, graph_scores

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2 ** 32)


def correlated(seed: int, d: int, n: int = 40) -> torch.Tensor:
    "One data set (1, n, d) of random linear mixtures with random scales and means."
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return draw(1, n, d) @ draw(d, d) * draw(d).exp() + draw(d)


def some_rows_set(seed: int, data: torch.Tensor) -> torch.Tensor:
    return torch.rand(data.shape, generator=torch.Generator().manual_seed(seed + 1)) < .2


def covered_reversals(G: torch.Tensor) -> list[torch.Tensor]:
    "Every graph that differs from G by the reversal of one edge i -> j with pa(j) = pa(i) + {i}."
    out = []
    for i, j in G.nonzero().tolist():
        parents = G[:, i].clone()
        parents[i] = True
        if torch.equal(parents, G[:, j]):
            H = G.clone()
            H[i, j], H[j, i] = False, True
            out.append(H)
    return out


@few
@given(seed=seeds, d=st.integers(2, 5), score=st.sampled_from(sorted(LOCAL_SCORES)))
def test_a_covered_edge_reversal_changes_no_score(seed, d, score):
    graphs = enumerate_dags(d)
    picked = torch.randint(len(graphs), (40,), generator=torch.Generator().manual_seed(seed))
    pairs = [(G, H) for G in graphs[picked] for H in covered_reversals(G)]
    if not pairs: return
    before, after = (torch.stack(side) for side in zip(*pairs))
    table = LOCAL_SCORES[score](correlated(seed, d))
    assert is_dag(after).all()
    assert (graph_scores(table, before) - graph_scores(table, after)).abs().max() < 1e-6
    both = equivalence_classes(torch.cat([before, after])).chunk(2)
    assert torch.equal(*both)


@pytest.mark.parametrize("d", [3, 4])
def test_classes_are_what_covered_reversals_connect(d):
    "Chickering (1995): two DAGs are equivalent exactly if covered edge reversals lead from one to the other."
    graphs = enumerate_dags(d)
    number = {tuple(G.flatten().tolist()): k for k, G in enumerate(graphs)}
    root = list(range(len(graphs)))

    def find(k):
        while root[k] != k: k = root[k]
        return k

    for k, G in enumerate(graphs):
        for H in covered_reversals(G): root[find(number[tuple(H.flatten().tolist())])] = find(k)
    connected = torch.tensor([find(k) for k in range(len(graphs))])
    classes = equivalence_classes(graphs)
    assert torch.equal(connected[:, None] == connected, classes[:, None] == classes)


@few
@given(seed=seeds, d=st.integers(2, 5), interventions=st.booleans(), order=st.randoms(use_true_random=False))
def test_relabelling_the_nodes_relabels_the_posterior(seed, d, interventions, order):
    data = correlated(seed, d)
    mask = some_rows_set(seed, data) if interventions else None
    perm = order.sample(range(d), d)
    one = exact_posterior(data, mask)
    two = exact_posterior(data[..., perm], None if mask is None else mask[..., perm])
    assert torch.allclose(one.edge_probs[:, perm][:, :, perm], two.edge_probs, atol=1e-8)
    assert torch.allclose(one.log_evidence, two.log_evidence, atol=1e-8)
    assert torch.allclose(one.entropy, two.entropy, atol=1e-7)
    assert torch.allclose(class_probs(one).sort().values, class_probs(two).sort().values, atol=1e-8)


@few
@given(seed=seeds, d=st.integers(1, 5), order=st.randoms(use_true_random=False))
def test_rows_may_come_in_any_order(seed, d, order):
    data = correlated(seed, d)
    mask = some_rows_set(seed, data)
    perm = order.sample(range(data.shape[1]), data.shape[1])
    one, two = bge_local_scores(data, mask), bge_local_scores(data[:, perm], mask[:, perm])
    assert torch.allclose(one, two, atol=1e-8)


@few
@given(seed=seeds, d=st.integers(2, 4))
def test_a_task_does_not_feel_its_batch(seed, d):
    data = torch.cat([correlated(seed + k, d) for k in range(4)])
    mask = some_rows_set(seed, data)
    mask[0] = False
    together = bge_local_scores(data, mask)
    alone = torch.cat([bge_local_scores(data[k:k + 1], mask[k:k + 1]) for k in range(4)])
    assert torch.allclose(together, alone, atol=1e-8)


@few
@given(seed=seeds, d=st.integers(2, 4))
def test_a_value_that_was_set_informs_only_the_other_nodes(seed, d):
    data = correlated(seed, d)
    mask = torch.zeros_like(data, dtype=torch.bool)
    mask[:, 10:20, 0] = True
    table, everything = bge_local_scores(data, mask), bge_local_scores(data)
    kept = torch.cat([data[:, :10], data[:, 20:]], 1)
    assert torch.allclose(table[:, 0], bge_local_scores(kept)[:, 0], atol=1e-8)
    assert torch.allclose(table[:, 1:], everything[:, 1:], atol=1e-8)


@few
@given(seed=seeds, d=st.integers(1, 5))
def test_the_exact_posterior_is_a_distribution(seed, d):
    exact = exact_posterior(correlated(seed, d))
    P, probs = exact.edge_probs[0], class_probs(exact)
    assert abs(exact.log_probs.exp().sum() - 1) < 1e-9
    assert (P >= 0).all() and (P + P.T <= 1 + 1e-9).all() and not P.diagonal().any()
    assert 0 <= exact.entropy <= torch.tensor(float(len(exact.graphs))).log() + 1e-9
    if d > 1:   # members of a class are equally probable, so the skeleton's probability splits by class only
        size = torch.bincount(dag_classes(d))
        assert torch.allclose(exact.log_probs.exp(), (probs / size)[:, dag_classes(d)], atol=1e-9)


@few
@given(seed=seeds, model=st.sampled_from(["exact", "random"]), limit=st.integers(1, 30))
def test_same_seed_same_posterior_and_a_budget_cuts_the_samples(seed, model, limit):
    data = correlated(seed, 4)[0].float()
    draw = lambda budget=None: build_model(model).posterior(data, n_samples=20, generator=torch.Generator().manual_seed(seed), budget=budget)
    one, two, cut = draw(), draw(), draw(Budget(samples=limit))
    assert torch.equal(one.graphs, two.graphs) and torch.equal(one.edge_probs, two.edge_probs) and one.info == two.info
    assert len(cut.graphs) == min(limit, 20) and cut.info["stopped_by"] == ("samples" if limit < 20 else None)
    assert torch.equal(cut.edge_probs, one.edge_probs) and is_dag(cut.graphs).all()


def test_sampling_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    exact = exact_posterior(correlated(0, 3))
    sample_graphs(exact, 10, torch.Generator().manual_seed(0))
    random_dags(10, 5, .3, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("columns", [17, 40])
def test_too_many_columns_is_one_sentence(columns):
    with pytest.raises(InputError, match=rf"the data have {columns} columns; it takes at most 16\.$"):
        build_model("exact").posterior(torch.zeros(10, columns), n_samples=1, generator=torch.Generator())


def test_identical_and_constant_columns_have_a_posterior():
    "BGe's prior keeps every matrix positive definite; a copied column is certainly adjacent to its source."
    column = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    data = torch.cat([column, column, torch.full((200, 1), 3.)], 1)
    exact = exact_posterior(data[None])
    assert torch.isfinite(exact.log_normaliser).all()
    P = exact.edge_probs[0]
    assert P[0, 1] + P[1, 0] > .999
    assert all(torch.isfinite(P[i, j]) for i, j in itertools.product(range(3), repeat=2))


class AnyDAG(Graph):
    "Uniform over all DAGs."
    type: str = "any_dag"
    def sample(self, streams, d): return enumerate_dags(d)[streams.integers("graph/any_dag", 0, len(enumerate_dags(d)))]


@pytest.fixture(scope="module")
def from_the_prior():
    "Graphs and data of 400 tasks of four nodes, from the prior of the BGe score."
    models = SCMFamily(graph=AnyDAG(), mechanism=BGeLinear(), standardise="none").sample(TaskStreams(5, "test", "bge", tuple(range(400))), 4)
    return models.graphs, models.sample(20).double()


def test_bge_linear_is_the_prior_of_the_bge_score(from_the_prior):
    "Gibbs: under no other prior is the log-evidence of these data higher on average."
    _, x = from_the_prior
    evidence = lambda **prior: exact_posterior(x, **prior).log_evidence
    true = evidence()
    for wrong in ({"alpha_w": 5.4}, {"alpha_w": 7.}, {"alpha_w": 9.}, {"alpha_mu": .4}, {"alpha_mu": 3.}):
        loss = evidence(**wrong) - true
        assert loss.mean() + 3*loss.std()/len(x)**.5 < 0, wrong


def test_the_exact_posterior_of_bge_linear_is_calibrated(from_the_prior):
    "Simulation-based calibration: the posterior mass above the true graph is uniform; it is not once data are standardised."
    truth, x = from_the_prior
    ties = TaskStreams(5, "test", "bge", tuple(range(400))).uniform("posterior/ties").double()

    def ranks(data):
        exact = exact_posterior(data)
        own = exact.log_probs[(truth[:, None] == exact.graphs).flatten(2).all(2)][:, None]
        p = exact.log_probs.exp()
        above, tied = ((p*which).sum(1) for which in (exact.log_probs > own + 1e-7, (exact.log_probs - own).abs() <= 1e-7))
        return (above + ties*tied).numpy()

    assert kstest(ranks(x), "uniform").pvalue > .001
    assert kstest(ranks((x - x.mean(1, keepdim=True))/x.std(1, keepdim=True)), "uniform").pvalue < 1e-6


def test_bge_linear_refuses_standardisation():
    for standardise in ("internal", "post"):
        with pytest.raises(ValueError, match="standardise: none"): SCMFamily(graph={"type": "er", "p": .5}, mechanism={"type": "bge_linear"}, standardise=standardise)
