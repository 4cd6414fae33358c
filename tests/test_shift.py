"A table is judged by what it says, and not by how it is written down; and whatever it says, the answer is finite or one sentence."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from causal_meta.datasets.benchmarks import load_benchmark
from causal_meta.datasets.streams import mixture_batch
from causal_meta.datasets.validation import InputError
from causal_meta.runners.shift import (STATISTICS, WORDS, audit_shift, findings, fit_statistics, judge, shift_p, shift_remarks, shift_score,
                                       table_sizes, table_statistics, training_statistics)

SMALL = load_benchmark("audit-small-v1")


@pytest.fixture(scope="module")
def trained(): return training_statistics(SMALL, 240)


@pytest.fixture(scope="module")
def reference(trained): return fit_statistics(*trained)


@st.composite
def tables(draw) -> tuple[torch.Tensor, torch.Tensor]:
    "Data (1, n, d) with dependence, perhaps rounded or heavy-tailed, and what was set."
    n, d = draw(st.integers(8, 60)), draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(1, n, d, generator=generator) @ torch.randn(d, d, generator=generator)
    kind = draw(st.sampled_from(["plain", "rounded", "heavy", "bent"]))
    x = {"plain": x, "rounded": (2*x).round(), "heavy": x**3, "bent": torch.cat([x[..., :1], x[..., :1]**2 + x[..., 1:]], -1)}[kind]
    return x, (torch.rand(1, n, d, generator=generator) < draw(st.sampled_from([0., .2]))).contiguous()


def same(a, b, tolerance=2e-3): assert torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True), (a - b).abs().max()


@settings(max_examples=40, deadline=None)
@given(tables(), st.randoms(use_true_random=False))
def test_order_does_not_matter(table, random):
    x, was_set = table
    rows, columns = (torch.tensor(random.sample(range(k), k)) for k in x.shape[1:])
    same(table_statistics(x, was_set), table_statistics(x[:, rows][:, :, columns], was_set[:, rows][:, :, columns]))


@settings(max_examples=40, deadline=None)
@given(tables(), st.data())
def test_units_do_not_matter(table, data):
    x, was_set = table
    scale = torch.tensor(data.draw(st.lists(st.sampled_from([-8., -2., -.5, .25, 1., 4., 16.]), min_size=x.shape[2], max_size=x.shape[2])))
    shift = torch.tensor(data.draw(st.lists(st.integers(-3, 3), min_size=x.shape[2], max_size=x.shape[2])))
    same(table_statistics(x.double(), was_set), table_statistics(x.double()*scale + shift, was_set))


def test_values_that_were_set_do_not_matter():
    x, was_set = torch.randn(2, 80, 4), torch.rand(2, 80, 4) < .3
    other = torch.where(was_set, torch.full_like(x, 1e3), x)
    assert torch.equal(table_statistics(x, was_set), table_statistics(other, was_set))


def test_a_batch_is_many_tables():
    x, was_set = torch.randn(5, 60, 4), torch.rand(5, 60, 4) < .1
    same(table_statistics(x, was_set), torch.cat([table_statistics(x[[b]], was_set[[b]]) for b in range(5)]), 1e-4)


def blanked(x, column):
    was_set = torch.zeros_like(x, dtype=torch.bool)
    was_set[..., column] = True
    return was_set


def halves(x):
    was_set = torch.zeros_like(x, dtype=torch.bool)
    was_set[:, ::2, 0] = was_set[:, 1::2, 1] = True
    return was_set


X = torch.randn(1, 40, 4, generator=torch.Generator().manual_seed(3))
DEGENERATE = {"a constant column": (torch.cat([X, torch.ones(1, 40, 1)], -1), None), "all constant": (torch.ones(1, 40, 3), None), "two columns": (X[..., :2], None),
              "two rows": (X[:, :2], None), "fewer rows than columns": (torch.randn(1, 5, 12), None), "copies": (torch.cat([X, X], -1), None), "binary": ((X > 0).float(), None),
              "all rows of a column set": (X, blanked(X, 1)), "everything set": (X, torch.ones_like(X, dtype=torch.bool)), "no row in common": (X[..., :2], halves(X[..., :2])),
              "one outlier": (torch.cat([X, torch.zeros(1, 40, 1).index_fill(1, torch.tensor([3]), 1e6)], -1), None)}


@pytest.mark.parametrize("x, was_set", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_degenerate_tables_have_a_score(reference, x, was_set):
    shift = shift_score(reference, x, was_set)
    assert shift.score.isfinite().all() and shift.residuals.isfinite().all() and 0 < shift.p <= 1
    assert all(isinstance(r, str) and "nan" not in r for r in shift_remarks(reference, x[0], None if was_set is None else was_set[0]) + findings(reference, x[0], None, None, 99))


@pytest.mark.parametrize("x, was_set, says", [(X[0], None, "shape"), (X[:, :1], None, "at least 2 rows"), (X[..., :1], None, "2 columns"), (X/0, None, "not finite"),
                                              (X, torch.zeros(1, 40, 3, dtype=torch.bool), "must be the same")])
def test_wrong_tables_are_refused(x, was_set, says):
    with pytest.raises(InputError, match=says): table_statistics(x, was_set)


def test_p_values_are_uniform_on_fresh_training_tables(reference):
    p = torch.cat([shift_p(reference, b.data, b.intervened) for k in range(12) for b in [mixture_batch(SMALL, 991, "fresh", range(64*k, 64*k + 8), SMALL.train.d[k % 6], 150 if k % 2 else 100)]])
    assert p.min() >= 1/241 and .35 < p.mean() < .65
    assert (p < .05).float().mean() < .15  # five per cent expected, of 96


def test_shifted_tables_are_found(reference):
    batch = mixture_batch(SMALL, 992, "fresh", range(16), 8, 200)
    assert (shift_p(reference, torch.sin(3*batch.data), batch.intervened) < .02).float().mean() > .8
    assert (shift_p(reference, batch.data**3, batch.intervened) < .02).float().mean() > .8
    assert (shift_p(reference, batch.data.round(), batch.intervened) < .02).all()
    [_, first, *_] = shift_remarks(reference, batch.data[0].round(), batch.intervened[0], list("abcdefgh"))
    assert first.startswith("values repeat more than in training") and first.count("'") == 2


def test_a_reference_is_a_small_file(reference):
    content = save(reference)
    assert len(content) + 4*(2000 - 240) < 50_000  # with two thousand scores, too
    again = load(content)
    assert torch.equal(shift_p(again, X), shift_p(reference, X))


def test_scores_do_not_depend_on_company(reference):
    x = torch.randn(6, 100, 5)
    same(shift_score(reference, x).score, torch.cat([shift_score(reference, x[[b]]).score for b in range(6)]), 1e-3)
    same(judge(reference, table_statistics(x), table_sizes(x)).score, shift_score(reference, x).score, 1e-5)


def test_one_size_is_enough():
    "A model that was trained on tables of one size has a reference, too; other sizes are named."
    reference = fit_statistics(*training_statistics(load_benchmark("linear20-v1"), 100))
    assert all(t.isfinite().all() for t in reference.values())
    said = shift_remarks(reference, torch.randn(30, 3), torch.arange(90).view(30, 3) % 7 == 0)
    assert "rows, this one has 30" in said[0] and "columns, this one has 3" in said[1] and "without interventions" in said[2]


def test_every_statistic_has_words(): assert {what for _, what in STATISTICS} == set(WORDS)


@pytest.mark.slow
def test_the_audit():
    "Found on the small audit: nearly all mechanisms; no graphs; no false alarms worth the name."
    reference = fit_statistics(*training_statistics(SMALL, 1000))
    found = audit_shift(reference, SMALL, "ab").query("family == 'all'").set_index("group")
    assert found.auroc["mechanism"] > .95 and found.auroc["compound"] > .95 and found.auroc["noise"] > .8
    assert found.warned["mechanism"] > .6 and found.warned["id"] < .05 and found.warned["interventional"] < .05 and found.warned["graph"] < .05
