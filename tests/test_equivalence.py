"Equivalence classes, against every order of the nodes."
from itertools import permutations

import numpy as np
import pytest
import torch

from causal_meta.datasets.validation import InputError
from causal_meta.metrics.cpdag import cpdag, v_structures
from causal_meta.metrics.equivalence import class_marginals, class_posterior, class_size, sample_class
from causal_meta.metrics.graph import off_diagonal


def random_chordal(rng: np.random.Generator, d: int) -> torch.Tensor:
    "A DAG without v-structure: each node's parents are a clique."
    G = torch.zeros(d, d).bool()
    for v in range(1, d):
        u = rng.integers(v)
        near = [w for w in G[:, u].nonzero()[:, 0].tolist() if rng.random() < .7]
        G[[u, *near], v] = True
    order = torch.from_numpy(rng.permutation(d))
    return G[order][:, order]


def by_orders(G: torch.Tensor) -> torch.Tensor:
    "All orientations of a skeleton without v-structure, from all orders."
    skeleton, place = G | G.mT, torch.tensor(list(permutations(range(len(G)))))
    oriented = (skeleton & (place[:, :, None] < place[:, None])).flatten(1).unique(dim=0).unflatten(1, G.shape)
    return oriented[~v_structures(oriented).flatten(1).any(1)]


@pytest.mark.parametrize("seed", range(12))
def test_chordal_graphs_of_seven_nodes(seed):
    G = random_chordal(np.random.default_rng(seed), 7)
    members = by_orders(G)
    assert class_size(G[None]) == [len(members)]
    assert torch.allclose(class_marginals(G[None])[0], members.double().mean(0), atol=1e-12)
    draws = sample_class(G, 50, torch.Generator().manual_seed(seed))
    assert (draws[:, None] == members).flatten(2).all(2).any(1).all()


@pytest.mark.parametrize("d", [20, 30])
def test_large_dense_graphs_are_no_trouble(d):
    "A complete graph without one edge: by symmetry its missing edge's ends, and the others, are alike."
    G = torch.ones(d, d).triu(1).bool()
    G[0, d - 1] = False
    P, others = class_marginals(G[None])[0], torch.arange(1, d - 1)
    assert (P[0, d - 1], P[d - 1, 0]) == (0, 0)
    assert torch.allclose(off_diagonal(P[others][:, others]), torch.tensor(.5, dtype=torch.float64)) and torch.allclose(P[0, others], P[d - 1, others])
    assert P[0, 1] + P[1, 0] == pytest.approx(1) and P[0, 1] < .5  # both ends first would be a collider
    assert (cpdag(sample_class(G, 20, torch.Generator().manual_seed(0))) == cpdag(G)).all()


def test_names_of_nodes_do_not_matter():
    G, order = random_chordal(np.random.default_rng(1), 15), torch.from_numpy(np.random.default_rng(2).permutation(15))
    assert torch.allclose(class_marginals(G[None])[0][order][:, order], class_marginals(G[order][:, order][None])[0], atol=1e-12)
    assert class_size(G[None]) == class_size(G[order][:, order][None])


def test_posterior_and_refusals():
    G = torch.tensor([[0, 1], [0, 0]]).bool()
    posterior = class_posterior(G, 10, torch.Generator().manual_seed(0))
    assert posterior.edge_probs.tolist() == [[0, .5], [.5, 0]] and posterior.valid_dag_rate == 1
    assert posterior.log_prob(G) == posterior.log_prob(G.T) == pytest.approx(-np.log(2)) and posterior.log_prob(G | G.T) == posterior.log_prob(G & ~G) == -np.inf
    assert torch.equal(posterior.graphs, class_posterior(G, 10, torch.Generator().manual_seed(0)).graphs)
    with pytest.raises(InputError, match="cycle"): class_marginals((G | G.mT)[None])
