"""Graphs that are drawn are acyclic, whatever is asked for; order and acyclicity agree with networkx."""
from __future__ import annotations

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_meta.datasets.graphs import (
    GRAPHS, ErdosRenyi, GraphConfig, ScaleFree, UniformDAG, count_edges, enumerate_dags, generations, is_dag, relabel, topological_order)
from causal_meta.datasets.randomness import TaskStreams
from causal_meta.datasets.structured_graphs import FixedGraph, GeometricGraph, GraphMixture, StochasticBlock, WattsStrogatz, wl_hash
from causal_meta.datasets.validation import InputError, Strict, parse

quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def directed_graphs(draw):
    "Any directed graph of 1 to 7 nodes, self-loops included."
    d = draw(st.integers(1, 7))
    return torch.tensor(draw(st.lists(st.booleans(), min_size=d * d, max_size=d * d))).reshape(d, d)


@st.composite
def plain_families(draw):
    "A family of the first notebook and a number of nodes that it allows."
    kind = draw(st.sampled_from(["er", "er exact", "sf", "uniform"]))
    if kind == "er": return ErdosRenyi(p=draw(st.floats(0, 1))), draw(st.integers(1, 25))
    if kind == "er exact":
        d = draw(st.integers(1, 25))
        return ErdosRenyi(exact_edges=draw(st.integers(0, d * (d - 1) // 2))), d
    if kind == "sf":
        m = draw(st.integers(1, 5))
        return ScaleFree(m=m, hub=draw(st.sampled_from(["in", "out", "random"]))), draw(st.integers(m + 1, 25))
    return UniformDAG(), draw(st.integers(1, 5))


@st.composite
def structured_families(draw):
    "A family with structure and a number of nodes that it allows."
    kind = draw(st.sampled_from(["sbm", "ws", "grg", "fixed"]))
    if kind == "sbm":
        blocks = draw(st.integers(1, 6))
        return StochasticBlock(n_blocks=blocks, p_intra=draw(st.floats(0, 1)), p_inter=draw(st.floats(0, 1))), draw(st.integers(blocks, 25))
    if kind == "ws":
        k = 2 * draw(st.integers(1, 4))
        return WattsStrogatz(k=k, p=draw(st.floats(0, 1))), draw(st.integers(k + 1, 25))
    if kind == "grg":
        d, dim = draw(st.integers(1, 25)), draw(st.integers(1, 4))
        if draw(st.booleans()): return GeometricGraph(radius=draw(st.floats(.01, 2)), dim=dim), d
        return GeometricGraph(edges_per_node=draw(st.floats(0, (d - 1) / 2)), dim=dim), d
    d = draw(st.integers(1, 9))
    edges = draw(st.sets(st.tuples(st.integers(0, d - 1), st.integers(0, d - 1)).filter(lambda e: e[0] < e[1]))) if d > 1 else []
    names = draw(st.permutations(range(d)))
    return FixedGraph(edges=[(names[i], names[j]) for i, j in edges], nodes=d, relabel=draw(st.booleans())), d


@st.composite
def families(draw):
    "Any family, mixtures among them, and a number of nodes that it allows."
    kind = draw(st.sampled_from(["plain", "structured", "structured", "mixture"]))
    if kind != "mixture": return draw(plain_families() if kind == "plain" else structured_families())
    family, d = draw(structured_families())
    weight = draw(st.floats(.05, .95))
    parts = [{"weight": weight, "graph": family}, {"weight": 1 - weight, "graph": ErdosRenyi(p=.5)}]
    if draw(st.booleans()): parts = [{"weight": .5, "graph": GraphMixture(components=parts)}, {"weight": .5, "graph": ErdosRenyi(p=0)}]
    return GraphMixture(components=parts), d


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
    assert torch.equal(family.sample(streams[::2], d), A[::2])
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


@quick
@given(st.integers(1, 25), st.integers(1, 6), st.floats(.01, 1), st.just(0.) | st.floats(1e-6, 1), st.floats(0, 1))
def test_sbm_expects_the_edges_asked_for_or_refuses(d, blocks, p_intra, p_inter, share):
    per_node = share * (d - 1) / 2
    family = StochasticBlock(n_blocks=blocks, p_intra=p_intra, p_inter=p_inter, edges_per_node=per_node)
    streams = TaskStreams(0, "test", "sbm", tuple(range(300)))
    block = torch.arange(d) % blocks
    same = (block[:, None] == block).triu(1).sum().item()
    pairs = d * (d - 1) // 2
    expected = p_intra * same + p_inter * (pairs - same)
    most = expected / max(p_intra if same else 0, p_inter if same < pairs else 0, 1e-9)
    if blocks > d or per_node * d > most * (1 + 1e-6):
        with pytest.raises(InputError, match="must be at most|room for at most"): family.sample(streams, d)
        return
    counts = count_edges(family.sample(streams, d)).float()
    assert abs(counts.mean().item() - per_node * d) <= 5 * (max(per_node * d, .1) / 300) ** .5 + 1e-4


@quick
@given(st.integers(1, 5), st.integers(1, 15), st.floats(0, 1))
def test_small_worlds_keep_the_edges_of_the_ring(half, extra, p):
    d = 2 * half + extra
    A = WattsStrogatz(k=2 * half, p=p).sample(TaskStreams(1, "test", "ws", tuple(range(20))), d)
    assert (count_edges(A) == d * half).all()
    assert not (A & A.transpose(1, 2)).any()


@quick
@given(st.integers(1, 25), st.floats(0, 1))
def test_closest_pairs_are_as_many_as_asked_for(d, share):
    per_node = share * (d - 1) / 2
    A = GeometricGraph(edges_per_node=per_node).sample(TaskStreams(1, "test", "grg", tuple(range(20))), d)
    assert ((count_edges(A) - per_node * d).abs() <= .5 + 1e-9).all()


class Holder(Strict):
    graph: GraphConfig


@quick
@given(families())
def test_a_family_survives_being_written_down(family_and_size):
    family, _ = family_and_size
    assert family.type in GRAPHS
    assert parse(Holder, {"graph": family.model_dump(mode="json", exclude_none=True)}, "test").graph == family


@pytest.mark.parametrize("wrong", [
    {"type": "er", "edges": -1}, {"type": "er", "edges": float("nan")}, {"type": "er", "p": 1.5}, {"type": "er", "exact_edges": -2},
    {"type": "er", "exact_edges": 3, "edges": 3}, {"type": "sbm", "p_intra": float("nan")}, {"type": "sbm", "n_blocks": 0}, {"type": "ws", "k": 3}, {"type": "ws", "k": 0},
    {"type": "grg", "radius": float("inf")}, {"type": "grg", "radius": .3, "edges_per_node": 1}, {"type": "fixed"}, {"type": "fixed", "adjacency": [[0, 1], [1, 0]]},
    {"type": "fixed", "adjacency": [[0, 1]]}, {"type": "fixed", "adjacency": [[1]]}, {"type": "fixed", "edges": [[0, 1]]}, {"type": "fixed", "edges": [[0, -1]], "nodes": 2},
    {"type": "mixture", "components": []}, {"type": "mixture", "components": [{"weight": .9, "graph": {"type": "er", "p": .1}}]}], ids=str)
def test_what_cannot_be_is_refused_in_one_sentence(wrong):
    with pytest.raises(InputError) as error: parse(Holder, {"graph": wrong}, "a.yaml")
    message = str(error.value)
    assert message.startswith("a.yaml: 'graph'") and "\n" not in message and message.endswith(".") and ".." not in message


@pytest.mark.parametrize("family, d", [
    (ErdosRenyi(exact_edges=11), 5), (ScaleFree(m=5), 5), (StochasticBlock(), 3), (StochasticBlock(edges_per_node=3), 20), (WattsStrogatz(), 4),
    (GeometricGraph(edges_per_node=3), 5), (FixedGraph(edges=[], nodes=3), 4)], ids=str)
def test_a_number_of_nodes_that_does_not_fit_is_refused(family, d):
    with pytest.raises(InputError, match=str(d)): family.sample(TaskStreams(0, "test", "any", (0, 1)), d)


@quick
@given(families(), st.integers(0, 2**40))
def test_the_hash_does_not_see_names(family_and_size, seed):
    family, d = family_and_size
    streams = TaskStreams(seed, "test", "hash", (3, 1, 4))
    A = family.sample(streams, d)
    h = wl_hash(A)
    assert h.shape == (3,) and h.dtype == torch.int64
    assert torch.equal(wl_hash(relabel(A, streams.permutation("posterior", d))), h)
    assert torch.equal(wl_hash(A[1:]), h[1:])


def test_the_hash_separates_small_dags_exactly():
    assert [len(wl_hash(enumerate_dags(d)).unique()) for d in range(1, 6)] == [1, 2, 6, 31, 302]  # A003087


def test_the_hash_never_changes():
    "Its values are stored."
    diamond = FixedGraph(edges=[[0, 1], [0, 2], [1, 3], [2, 3]], nodes=4).sample(TaskStreams(0, "test", "any", (0,)), 4)
    assert wl_hash(diamond).item() == 4651451121392004044
