"Gaussian-process mechanisms inside whole models: batches, rows, interventions, memory, and what the parents explain."
from __future__ import annotations

import sys
from unittest.mock import patch

import pytest
import torch

from causal_meta.datasets.diagnostics import constant_columns, signal
from causal_meta.datasets.gp_exact import GPCDEExact, _kernel_class
from causal_meta.datasets.gp_features import GPCDE, SQUARES, cosine, fixed_point, on_grid
from causal_meta.datasets.randomness import TaskStreams
from causal_meta.datasets.scm import SCMFamily
from causal_meta.datasets.validation import InputError

CHAIN = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()


def family(mechanism, edges=4): return SCMFamily(graph={"type": "er", "edges": edges}, mechanism=mechanism)


def tasks(*indices): return TaskStreams(3, "train", "gp", indices)


def downstream(graphs, node):
    "Which nodes of each task (B, d) a node can change, itself included."
    reach = torch.eye(graphs.shape[-1]) + graphs.float()
    return torch.linalg.matrix_power(reach, graphs.shape[-1])[:, node] > 0


def test_parameters_do_not_depend_on_the_batch():
    graphs = family(GPCDE(), 20).graph.sample(tasks(*range(37)), 12)
    whole = GPCDE(features=40).init(tasks(*range(37)), graphs)
    for some in ([0], [36, 5], [1, 2, 3], list(range(10, 31))):
        part = GPCDE(features=40).init(tasks(*some), graphs[some])
        for name, value in part.items():
            among = whole[name][some]
            if name in ("frequency", "lengthscale"): among = among[:, :, :value.shape[2]]
            assert torch.equal(value, among), name


@pytest.mark.parametrize("d, n", [(5, 70), (12, 333)])
def test_data_depend_on_neither_batch_nor_number_of_rows(d, n):
    whole = family(GPCDE(), 2*d).sample(tasks(*range(9)), d)
    x = whole.sample(n)
    assert x.isfinite().all() and (x.abs() < 1e3).all() and not constant_columns(x).any()
    for some in ([4], [8, 1, 2]):
        part = family(GPCDE(), 2*d).sample(tasks(*some), d)
        assert torch.equal(part.sample(n), x[some])
        assert torch.equal(part.sample(n - 41), x[some, :n - 41])


def test_do_keeps_the_function():
    model = family(GPCDE(), 8).sample(tasks(*range(20)), 5)
    x, y = model.sample(60), model.do({2: 1.5}).sample(60)
    changed = downstream(model.graphs, 2)
    assert torch.equal(x[(~changed)[:, None].expand_as(x)], y[(~changed)[:, None].expand_as(y)])
    assert torch.equal(y[..., 2], torch.full((20, 60), 1.5))
    assert model.do({2: 1e4}).sample(20).isfinite().all()


def test_the_share_that_parents_explain():
    share = signal(family(GPCDE(), 20).sample(tasks(*range(30)), 10), 1000)
    share = share[share.isfinite()]
    assert .06 < share.median() < .14
    assert (share > .02).double().mean() > .85


def test_extreme_phases_and_inputs():
    phase = torch.tensor([-2**31, 2**31 - 1, 0, 2**30, -2**30], dtype=torch.int32)
    wave = cosine(phase, torch.empty(5), [torch.tensor(c) for c in SQUARES])
    assert torch.allclose(wave, torch.tensor([-1., -1, 1, 0, 0]), atol=1e-5)
    assert fixed_point(torch.tensor([.5, 1e6 + .5, -.5], dtype=torch.float64)).abs().tolist() == [-2**31]*3  # half a turn is the same both ways
    assert on_grid(torch.tensor([1e6])).item() == 1_024_000_000


def exact_or_skip(): pytest.importorskip("gpytorch", reason="the extra gp is not installed")


def test_exact_functions_are_remembered():
    exact_or_skip()
    fixed = SCMFamily(graph={"type": "er", "p": .6}, mechanism=GPCDEExact())
    model = fixed.sample(tasks(0, 1, 2), 4)
    x = model.sample(40)
    assert x.isfinite().all()
    changed = downstream(model.graphs, 1)
    y = model.do({1: .5}).sample(40)
    same = (~changed)[:, None].expand_as(x)
    assert torch.equal(x[same], y[same])
    assert torch.equal(model.sample(40), x), "what was drawn before comes back"
    assert torch.equal(model.do({1: .5}).sample(40), y), "under do() too"
    assert not torch.equal(model.sample(40, "noise/test"), x)


def test_exact_data_do_not_depend_on_the_batch():
    exact_or_skip()
    def both(*indices):
        model = family(GPCDEExact()).sample(tasks(*indices), 4)
        return torch.cat([model.sample(30), model.do({0: 1.}).sample(30), model.sample(20, "noise/test")], 1)
    whole = both(0, 1, 2, 3)
    assert torch.equal(both(2), whole[[2]])
    assert torch.equal(both(3, 0), whole[[3, 0]])


def test_both_modes_have_the_same_kernels():
    exact_or_skip()
    graphs = CHAIN.expand(5, 3, 3)
    features, exact = GPCDE().init(tasks(*range(5)), graphs), GPCDEExact().init(tasks(*range(5)), graphs)
    for name in ("lengthscale", "power"): assert torch.equal(features[name], exact[name])
    one, other = GPCDE().noise(tasks(1), "noise", 9, 3), GPCDEExact().noise(tasks(1), "noise", 9, 3)
    for name in ("scale", "e"): assert torch.equal(one[name], other[name])


def test_the_module_does_without_gpytorch_until_it_is_asked():
    _kernel_class.cache_clear()
    with patch.dict(sys.modules, {"gpytorch": None}), pytest.raises(InputError, match=r'pip install "causal_meta\[gp\]"'):
        family({"type": "gpcde_exact"}).sample(tasks(0), 4)
    _kernel_class.cache_clear()
