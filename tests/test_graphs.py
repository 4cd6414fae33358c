"""Graphs that are drawn are acyclic, whatever is asked for; order and acyclicity agree with networkx."""
from __future__ import annotations

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_meta.datasets.graphs import ErdosRenyi, ScaleFree, UniformDAG, count_edges, enumerate_dags, generations, is_dag, topological_order
from causal_meta.datasets.randomness import TaskStreams
from causal_meta.datasets.validation import InputError

quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def directed_graphs(draw):
    "Any directed graph of 1 to 7 nodes, self-loops included."
    d = draw(st.integers(1, 7))
    return torch.tensor(draw(st.lists(st.booleans(), min_size=d * d, max_size=d * d))).reshape(d, d)


@st.composite
def families(draw):
    "A family and a number of nodes that it allows."
    kind = draw(st.sampled_from(["er", "sf", "uniform"]))
    if kind == "er": return ErdosRenyi(p=draw(st.floats(0, 1))), draw(st.integers(1, 25))
    if kind == "sf":
        m = draw(st.integers(1, 5))
        return ScaleFree(m=m, hub=draw(st.sampled_from(["in", "out", "random"]))), draw(st.integers(m + 1, 25))
    return UniformDAG(), draw(st.integers(1, 5))


@quick
@given(families(), st.integers(0, 2**40), st.lists(st.integers(0, 2**40), min_size=1, max_size=6, unique=True))
def test_sampled_graphs_are_dags_and_do_not_depend_on_the_batch(family_and_size, seed, indices):
    family, d = family_and_size
    streams = TaskStreams(seed, "train", "any", tuple(indices))
    A = family.sample(streams, d)
    assert A.shape == (len(indices), d, d) and A.dtype == torch.bool
    assert is_dag(A).all()
    assert not A.diagonal(dim1=1, dim2=2).any()
    assert torch.equal(family.sample(streams[-1], d)[0], A[-1])
    order = topological_order(A)
    position = order.argsort(-1)
    task, cause, effect = A.nonzero(as_tuple=True)
    assert (position[task, cause] < position[task, effect]).all()


@quick
@given(directed_graphs())
def test_acyclicity_and_generations_agree_with_networkx(A):
    G = nx.from_numpy_array(A.int().numpy(), create_using=nx.DiGraph)
    assert bool(is_dag(A)) == nx.is_directed_acyclic_graph(G)
    if not is_dag(A):
        with pytest.raises(InputError): topological_order(A)
        return
    for level, nodes in enumerate(nx.topological_generations(G)):
        assert all(generations(A)[node] == level for node in nodes)


@quick
@given(st.integers(2, 30), st.floats(0, 1))
def test_er_expects_the_edges_asked_for(d, share):
    edges = share * d * (d - 1) / 2
    A = ErdosRenyi(edges=edges).sample(TaskStreams(0, "test", "er", tuple(range(400))), d)
    p = share
    error = (d * (d - 1) / 2 * p * (1 - p) / 400) ** .5
    assert abs(count_edges(A).float().mean().item() - edges) <= 5 * error + 1e-4


@quick
@given(st.integers(1, 5), st.integers(0, 20))
def test_scale_free_counts(m, extra):
    d = m + 1 + extra
    A = ScaleFree(m=m).sample(TaskStreams(1, "test", "sf", tuple(range(20))), d)
    assert (count_edges(A) == m * d - m * (m + 1) // 2).all()


def test_all_labelled_dags():
    assert [len(enumerate_dags(d)) for d in range(1, 6)] == [1, 3, 25, 543, 29281]
    five = enumerate_dags(5)
    assert is_dag(five).all()
    assert len(torch.unique(five.flatten(1), dim=0)) == 29281
