"Properties of the sortability baselines and of the priors over graphs that hold for every data set."
from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_meta.datasets.benchmarks import load_benchmark
from causal_meta.datasets.diagnostics import predictability, r2_sortability, varsortability
from causal_meta.datasets.graphs import enumerate_dags, is_dag
from causal_meta.datasets.randomness import TaskStreams
from causal_meta.datasets.scm import SCMFamily
from causal_meta.datasets.tasks import MetaFixedDataset
from causal_meta.datasets.validation import InputError
from causal_meta.models.base import Budget, build_model
from causal_meta.models.random import RandomConfig, prior_dags, prior_edge_probs
from causal_meta.models.scores import moments
from causal_meta.models.sortability import adaptive_lasso, correlations, draw_counts, resampled_moments, sort_regress, sort_scores

few = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)


def generator(seed: int) -> torch.Generator: return torch.Generator().manual_seed(seed)


def linear(seed: int, d: int, n: int, edges_per_node: float = 1.) -> tuple[torch.Tensor, torch.Tensor]:
    "The graph (d, d) and raw data (n, d) of a linear model."
    family = SCMFamily(graph={"type": "er", "edges_per_node": min(edges_per_node, (d - 1)/2)}, mechanism={"type": "linear", "low": .5, "high": 2.}, standardise="none")
    batch = family.sample(TaskStreams(seed, "test", "linear", (0,)), d)
    return batch.graphs[0], batch.sample(n)[0]


def some_set(seed: int, data: torch.Tensor, share: float = .2) -> torch.Tensor: return torch.rand(data.shape, generator=generator(seed)) < share


@few
@given(seed=seeds, d=st.integers(2, 9), n=st.integers(2, 60), by=st.sampled_from(["variance", "r2", "random"]), done=st.booleans(), bootstrap=st.booleans())
def test_any_data_give_a_valid_posterior(seed, d, n, by, done, bootstrap):
    _, x = linear(seed, d, n)
    mask = some_set(seed, x) if done else None
    model = build_model("sortability", {"by": by, "bootstrap": bootstrap})
    one, two = (model.posterior(x, mask, n_samples=30, generator=generator(seed)) for _ in range(2))
    assert one.graphs.shape == (30, d, d) and is_dag(one.graphs).all()
    assert torch.equal(one.graphs, two.graphs) and one.info == two.info and json.loads(json.dumps(one.info)) == one.info
    assert torch.allclose(one.edge_probs.double(), one.graphs.double().mean(0), atol=1e-6) and 0 <= one.info["order_agreement"] <= 1
    assert bootstrap or len(one.graphs.unique(dim=0)) == 1


@few
@given(seed=seeds, d=st.integers(2, 6), done=st.booleans())
def test_moments_of_counts_are_moments_of_repeated_rows(seed, d, done):
    _, x = linear(seed, d, 25)
    x = x.double()/x.double().std(0)
    mask = some_set(seed, x) if done else torch.zeros_like(x, dtype=torch.bool)
    counts = draw_counts(5, 25, generator(seed), x.device)
    fast, distinct = resampled_moments(x, mask, counts)
    for k in range(5):
        rows = torch.arange(25).repeat_interleave(counts[k].long())
        slow = moments(x[None, rows], mask[None, rows])
        if slow.rows.shape[1] != fast.rows.shape[1]: continue  # no drawn row was set
        for name in ("rows", "mean", "scatter"): assert torch.allclose(getattr(fast, name)[k], getattr(slow, name)[0], atol=1e-8)
        assert (distinct[k] <= 25).all() and (distinct[k] <= fast.rows[k]).all()


@few
@given(seed=seeds, d=st.integers(2, 8))
def test_the_criterion_of_a_node_comes_from_the_rows_in_which_it_is_free(seed, d):
    _, x = linear(seed, d, 80)
    x = x.double()/x.double().std(0)
    mask = some_set(seed, x)
    m, _ = resampled_moments(x, mask, torch.ones(1, 80, dtype=torch.float64))
    r2, variance = (sort_scores(m, correlations(m), torch.ones(d), by, generator(0))[0] for by in ("r2", "variance"))
    for j in range(d):
        free = x[~mask[:, j]]
        assert abs(r2[j] - predictability(free[None])[0, j]) < 1e-6 and abs(variance[j] - free[:, j].var(correction=0)) < 1e-8


@few
@given(seed=seeds, order=st.permutations(range(7)))
def test_renamed_nodes_give_the_renamed_graph(seed, order):
    _, x = linear(seed, 7, 100)
    for by in ("variance", "r2"):
        model = build_model("sortability", {"by": by})
        one, two = (model.posterior(data, n_samples=20, generator=generator(seed)) for data in (x, x[:, order]))
        assert torch.equal(one.graphs[:, order][:, :, order], two.graphs)


def test_a_node_that_is_always_set_has_no_parents_and_rows_in_which_it_was_set_do_not_matter():
    graph, x = linear(3, 6, 300)
    j = int(graph.sum(0).argmax())
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[:100, j] = True
    changed = x.clone()
    changed[:100, j] = 40*torch.randn(100, generator=generator(0))
    model = build_model("sortability", {"by": "variance", "bootstrap": False})
    # whatever was set there, the regression of j and its variance are those of the other rows: compare column j of the graph where the order is the same
    one, two = (model.posterior(data, mask, n_samples=1, generator=generator(0)).graphs[0] for data in (x, x.where(~mask, 0.)))
    assert torch.equal(one[:, j], two[:, j])
    mask[:, j] = True
    assert not model.posterior(changed, mask, n_samples=1, generator=generator(0)).graphs[0, :, j].any()


def test_budgets_cut_and_do_not_change_what_is_kept():
    _, x = linear(1, 20, 100, 2)
    model = build_model("sortability")
    draw = lambda budget=None, n=120: model.posterior(x, n_samples=n, generator=generator(5), budget=budget)
    full = draw()
    assert torch.equal(draw(Budget(samples=60)).graphs, full.graphs[:60]) and torch.equal(draw(Budget(steps=60)).graphs, full.graphs[:60])
    clock = Budget(seconds=.3).clock()
    hasty = draw(Budget(seconds=.3), 100_000)
    assert hasty.info["stopped_by"] == "seconds" and len(hasty.graphs) == hasty.info["steps"] and clock.seconds < .3*1.1 + .7  # a busy machine


@pytest.mark.parametrize("name", ["sortability", "random"])
def test_bad_input_is_one_sentence(name):
    model, x = build_model(name), torch.randn(9, 3, generator=generator(0))
    for data, mask, words in ((x[:, :1], None, "at least 2 are needed"), (x[None], None, "it must be (n, d)"), (x[:0], None, "0 rows"),
                              (x.masked_fill(x == x.max(), torch.nan), None, "missing or infinite"), (x, x[:4] > 0, "intervened has shape")):
        with pytest.raises(InputError) as error: model.posterior(data, mask, n_samples=2, generator=generator(0))
        assert words in str(error.value) and str(error.value).startswith(f"{name}: ")


def test_near_duplicates_and_exact_relations_do_no_harm():
    g = generator(0)
    x = torch.randn(50, 3, generator=g)
    x = torch.cat([x, x[:, :1], x[:, 1:2] + x[:, 2:], x[:, :1] + 1e-6*torch.randn(50, 1, generator=g), torch.zeros(50, 1)], 1)
    for by in ("variance", "r2"):
        p = build_model("sortability", {"by": by}).posterior(x, n_samples=40, generator=g)
        assert is_dag(p.graphs).all() and not p.edge_probs[6].any() and not p.edge_probs[:, 6].any()


def test_sorting_by_variance_finds_raw_linear_graphs_and_not_standardised_ones():
    right = {True: [], False: []}
    for seed in range(6):
        graph, x = linear(seed, 8, 400, 1.5)
        for raw in right:
            p = build_model("sortability", {"by": "variance"}).posterior(x if raw else (x - x.mean(0))/x.std(0), n_samples=30, generator=generator(seed)).edge_probs
            right[raw].append((p[graph].sum()/(p[graph].sum() + p.T[graph].sum())).item())  # of the true edges that are joined, those that point forward
    assert np.mean(right[True]) > .9 and abs(np.mean(right[False]) - .5) < .25


# the priors

@few
@given(seed=seeds, d=st.integers(3, 8), graph=st.sampled_from([
    {"type": "er", "edges_per_node": 1}, {"type": "er", "exact_edges": 2}, {"type": "sf", "m": 1}, {"type": "sbm", "n_blocks": 2}, {"type": "ws", "k": 2}, {"type": "grg"}, {"type": "grg", "edges_per_node": 1},
    {"type": "mixture", "components": [{"weight": .5, "graph": {"type": "sf", "m": 2}}, {"weight": .5, "graph": {"type": "er", "p": .2}}]}]))
def test_a_family_of_graphs_as_a_prior(seed, d, graph):
    x, model = torch.zeros(1, d), build_model("random", {"graph": graph})
    one, two = (model.posterior(x, n_samples=300, generator=generator(seed)) for _ in range(2))
    assert torch.equal(one.graphs, two.graphs) and is_dag(one.graphs).all() and json.loads(json.dumps(one.info)) == one.info
    sd = (one.graphs.sum((1, 2)).double().var()/300).sqrt()
    assert abs(one.graphs.double().sum((1, 2)).mean() - one.edge_probs.sum()) < 5*sd + 1e-3*d*d
    cut = model.posterior(x, n_samples=300, generator=generator(seed), budget=Budget(samples=7))
    assert torch.equal(cut.graphs, one.graphs[:7]) and cut.info["stopped_by"] == "samples"


@pytest.mark.parametrize("d", [2, 3, 4])
def test_the_uniform_prior_is_uniform(d):
    p = build_model("random", {"graph": {"type": "uniform"}}).posterior(torch.zeros(1, d), n_samples=1, generator=generator(0))
    dags = enumerate_dags(d)
    assert abs(sum(math.exp(p.log_prob(G)) for G in dags) - 1) < 1e-9
    assert torch.allclose(p.edge_probs, dags.double().mean(0)) and p.log_prob(torch.ones(d, d)) == -math.inf


def test_the_prior_does_not_know_the_test_graphs():
    "The streams of a prior are none of a benchmark's, and each seed gives other graphs."
    graph = RandomConfig(graph=load_benchmark("exact5-v1").test["id/n100"].scm.graph.model_dump()).graph
    tasks = torch.stack([MetaFixedDataset(load_benchmark("exact5-v1"), "a")[k].graph for k in range(10)])
    draws = [prior_dags(graph, 10, 5, seed) for seed in (0, 20003)]
    assert not torch.equal(draws[0], draws[1]) and not any(torch.equal(d, tasks) for d in draws)


def test_the_default_prior_is_what_it_was():
    "Frozen results of the smoke run depend on every bit of it."
    p = build_model("random").posterior(torch.zeros(1, 5), n_samples=4, generator=generator(0))
    assert p.info == {"model": "random", "log_prob": "random_order", "stopped_by": None} and list(p.parameters) == ["p"]
    place = torch.rand(4, 5, generator=(g := generator(0))).argsort(1)
    assert torch.equal(p.graphs, (torch.rand(4, 5, 5, generator=g) < .5) & (place[:, :, None] < place[:, None, :]))
    assert torch.equal(p.edge_probs, torch.full((5, 5), .25, dtype=torch.float64).fill_diagonal_(0))


def test_probabilities_of_edges_are_kept_and_not_handed_out():
    model = build_model("random", {"graph": {"type": "grg"}})
    p = model.posterior(torch.zeros(1, 6), n_samples=1, generator=generator(0))
    p.edge_probs.zero_()
    assert prior_edge_probs(model.config.graph, 6)[0].sum() > 0 and p.info["edge_probs"] == "mean of 4000 draws"


# another implementation

@pytest.mark.peers
@pytest.mark.parametrize("d, n, edges_per_node", [(5, 60, 1), (10, 200, 2), (20, 100, 2), (20, 500, 4)])
def test_orders_and_graphs_are_those_of_causaldisco(d, n, edges_per_node):
    analytics, baselines = pytest.importorskip("CausalDisco.analytics"), pytest.importorskip("CausalDisco.baselines")
    for seed in range(5):
        graph, x = linear(seed, d, n, edges_per_node)
        x = x.double()
        assert abs(varsortability(x[None], graph[None]) - analytics.var_sortability(x.numpy(), graph.numpy())) < 1e-9
        assert abs(r2_sortability(x[None], graph[None]) - analytics.r2_sortability(x.numpy(), graph.numpy())) < 1e-6
        scale, once = x.std(0), torch.ones(1, n, dtype=torch.float64)
        m, distinct = resampled_moments((x - x.mean(0))/scale, torch.zeros_like(x, dtype=torch.bool), once)
        for by, theirs, values in (("variance", baselines.var_sort_regress, np.var(x.numpy(), axis=0)), ("r2", baselines.r2_sort_regress, analytics.r2coeff(x.numpy().T))):
            found, place = sort_regress(m, distinct, scale, by, generator(0))
            assert np.array_equal(place[0].argsort().numpy(), np.argsort(values))
            assert np.array_equal(found[0].numpy(), theirs(x.numpy()) != 0)
            posterior = build_model("sortability", {"by": by, "bootstrap": False}).posterior(x.float(), n_samples=2, generator=generator(0))
            assert torch.equal(posterior.graphs[0], found[0])


@pytest.mark.peers
def test_the_regression_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    for seed in range(40):
        rng = np.random.default_rng(seed)
        X = rng.normal(size=(50, 8))@(np.eye(8) + .7*rng.normal(size=(8, 8)))  # strongly correlated: predictors also leave the path
        y = X@(rng.normal(size=8)*(rng.random(8) < .5)) + 2*rng.normal(size=50)
        weight = np.abs(linear_model.LinearRegression().fit(X, y).coef_)
        theirs = linear_model.LassoLarsIC(criterion="bic").fit(X*weight, y).coef_ != 0
        C = torch.corrcoef(torch.tensor(np.column_stack([X, y])).T)
        ours = adaptive_lasso(C[None], C[None, -1], torch.tensor([[True]*8 + [False]]), torch.tensor([50.]))
        assert np.array_equal(ours[0, :-1].numpy(), theirs), seed
