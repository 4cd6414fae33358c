"Likelihoods: what must hold whatever the data, for both scorers."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_meta.datasets.graphs import is_dag
from causal_meta.datasets.tasks import InterventionalSet
from causal_meta.metrics.gp import gp
from causal_meta.metrics.likelihood import LIKELIHOODS, Remembered, acyclic, graph_log_densities, likelihoods, regressions_of, unseen_rows
from causal_meta.metrics.linear_gaussian import linear_gaussian
from causal_meta.models.base import from_graphs

SCORERS = {"linear_gaussian": linear_gaussian, "gp": gp}
seeds = st.integers(0, 2**31 - 1)


def task(seed, d=4, n=25, interventional=True):
    "Data, mask, held-out rows, sets and some DAGs, of no particular model."
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=g)
    draw = lambda rows: torch.tanh(torch.randn(rows, d, generator=g)@mixing) + .3*torch.randn(rows, d, generator=g)
    data, mask, sets = draw(n), torch.zeros(n, d, dtype=torch.bool), []
    if interventional: mask[:n//5, int(torch.randint(d, (), generator=g))] = True
    for j in range(2):
        rows = draw(6)
        sets.append(InterventionalSet([j], rows[0, j:j + 1], rows, torch.eye(d).bool()[[j]*6]))
    order = torch.rand(12, d, generator=g).argsort(1)
    graphs = (torch.rand(12, d, d, generator=g) < .5) & (order[:, :, None] < order[:, None, :])
    return data, mask, draw(10), sets, graphs, torch.rand(12, generator=g).double().softmax(0)


def scored(scorer, data, mask, held_out, sets, graphs, weights):
    rows = unseen_rows(held_out, sets)
    return likelihoods(graph_log_densities(scorer(data, mask, rows), graphs, rows.free), weights, rows)


@pytest.mark.parametrize("name", SCORERS)
@given(seeds)
@settings(max_examples=15, deadline=None)
def test_names_of_nodes_and_order_of_rows_and_graphs_do_not_matter(name, seed):
    data, mask, held_out, sets, graphs, weights = task(seed)
    g = torch.Generator().manual_seed(seed + 1)
    perm, rows, of_graphs = (torch.randperm(n, generator=g) for n in (4, 25, 12))
    if name == "gp": rows = torch.arange(25)  # its inducing rows are every so-manieth row; all of them here, but summed in another order
    renamed = [InterventionalSet([perm.tolist().index(s.targets[0])], s.values, s.rows[:, perm], s.intervened[:, perm]) for s in reversed(sets)]
    one = scored(SCORERS[name], data, mask, held_out, sets, graphs, weights)
    other = scored(SCORERS[name], data[rows][:, perm], mask[rows][:, perm], held_out[:, perm].flip(0), renamed, graphs[of_graphs][:, perm][:, :, perm], weights[of_graphs])
    assert torch.allclose(torch.tensor([one[k] for k in LIKELIHOODS]), torch.tensor([other[k] for k in LIKELIHOODS]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCORERS)
@given(seeds)
@settings(max_examples=10, deadline=None)
def test_an_average_is_never_worse_than_its_graphs_on_average_and_never_better_than_the_best(name, seed):
    data, mask, held_out, sets, graphs, weights = task(seed)
    rows = unseen_rows(held_out, sets)
    logs = graph_log_densities(SCORERS[name](data, mask, rows), graphs, rows.free)
    found = likelihoods(logs, weights, rows)
    assert found["nil"] <= found["e_nll"] + 1e-9
    assert found["nil"] >= -logs[:, :10].max(0).values.mean() - 1e-9
    sure = likelihoods(logs, torch.eye(12)[3].double(), rows)
    assert abs(sure["nil"] - sure["e_nll"]) < 1e-9


@pytest.mark.parametrize("name", SCORERS)
@given(seeds)
@settings(max_examples=10, deadline=None)
def test_shared_fits_are_the_fits(name, seed):
    data, mask, held_out, sets, graphs, _ = task(seed)
    rows = unseen_rows(held_out, sets)
    memory, r = Remembered(SCORERS[name](data, mask, rows)), regressions_of(graphs)
    memory(r.nodes[::2], r.parents[::2])
    together = memory(r.nodes, r.parents)
    for u in range(0, len(r.nodes), 3):
        assert torch.allclose(together[u], SCORERS[name](data, mask, rows)(r.nodes[u:u + 1], r.parents[u:u + 1])[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SCORERS)
def test_rows_in_which_a_node_was_set_do_not_teach_its_mechanism(name):
    data, mask, held_out, sets, _, _ = task(3, interventional=False)
    mask[:5, 2] = True
    other = data.clone()
    other[:5, 2] = 40.
    rows = unseen_rows(held_out, sets)
    nodes, parents = torch.tensor([2, 2]), torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    assert torch.allclose(SCORERS[name](data, mask, rows)(nodes, parents), SCORERS[name](other, mask, rows)(nodes, parents), atol=1e-5)
    changed = SCORERS[name](other, mask, rows)(torch.tensor([0]), torch.tensor([[0, 0, 1, 0]]).bool())  # as a parent its values count
    assert not torch.allclose(SCORERS[name](data, mask, rows)(torch.tensor([0]), torch.tensor([[0, 0, 1, 0]]).bool()), changed, atol=1e-2)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_cyclic_samples_are_left_out_and_weights_scaled(seed):
    *_, graphs, weights = task(seed)
    g = torch.Generator().manual_seed(seed)
    mixed = torch.where((torch.rand(12, generator=g) < .5)[:, None, None], graphs, torch.rand(12, 4, 4, generator=g) < .5) & ~torch.eye(4, dtype=torch.bool)
    dag = is_dag(mixed)
    if not dag.any(): return
    kept, w = acyclic(mixed, weights)
    assert is_dag(kept).all() and abs(w.sum() - 1) < 1e-9 and len(kept) == len(mixed[dag].unique(dim=0))
    assert torch.allclose(from_graphs(kept, w.log()).edge_probs, from_graphs(mixed[dag], weights[dag].log()).edge_probs, atol=1e-6)


@pytest.mark.parametrize("name", SCORERS)
def test_constant_and_copied_columns_are_survived(name):
    data, mask, held_out, sets, graphs, weights = task(5)
    data[:, 1], data[:, 3] = 2., data[:, 0]
    held_out[:, 3] = held_out[:, 0]
    found = scored(SCORERS[name], data, mask, held_out, sets, graphs, weights)
    assert all(v is not None and abs(v) < 1e9 for v in found.values())
