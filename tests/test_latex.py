"The LaTeX tables of a study compile in a bare article, where there is a TeX."
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

from causal_meta.analysis.study_tables import grouped_table, study_tables
from causal_meta.analysis.tables import Table

TEX = next((name for name in ("pdflatex", "xelatex", "lualatex", "tectonic") if shutil.which(name)), None)
ARTICLE = r"""\documentclass{article}
\usepackage{booktabs}
\begin{document}
%s
See Table~\ref{tab:main} and Table~\ref{tab:odd}.
\end{document}
"""


def study():
    "Results of two models, one of them with two training seeds, under two factors."
    rng, rows = np.random.default_rng(0), []
    for factor in ("in distribution", "noise & more_100%"):
        for index in range(6):
            for model, seeds in (("pair_former", (0, 1)), ("exact", (pd.NA,))):
                rows += [{"model": model, "training_seed": s, "seed_list": "a", "family": f"{factor}/x", "index": index, "factor": factor, "mechanism": "linear", "d": 5, "n": 100,
                          "e_shd": rng.gamma(4), "auroc": rng.uniform(.5, 1), "edge_log_prob": -rng.gamma(9), "ece": rng.uniform(0, .2), "exact_error": rng.uniform(0, .1),
                          "exact_pair_tv": rng.uniform(0, .1), "exact_log_prob_gap": rng.uniform(0, 1), "compute_cpu_seconds": rng.uniform(.01, 1), "compute_peak_rss_bytes": 1e8} for s in seeds]
    return pd.DataFrame(rows)


def tables():
    "All that a study prints, and one of odd characters."
    found = study_tables(study(), {"pair_former": {"cpu_seconds": 900., "tasks_seen": 32000, "seconds": 500.}})
    odd = Table(("a_b", "50% & more ↑"), (("#1 {x}", "0.5 [0.4, 0.6]"), ("~^\\$", "–")), frozenset({(0, 1)}), frozenset({0}), pd.DataFrame(), "A caption: 100% of $x$_y & more.", frozenset({(1, 1)}))
    return {**found, "odd": odd}


def test_it_balances():
    for name, table in tables().items():
        text = table.to_latex(f"tab:{name}")
        opened, closed = re.findall(r"\\begin\{(\w+)\}", text), re.findall(r"\\end\{(\w+)\}", text)
        assert sorted(opened) == sorted(closed) and text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}"), name
    assert {"main", "exact", "cost", "break_even", "mechanisms"} <= set(tables())


def compiled(text, folder):
    "Typeset a document twice, for its references; the finished process, and the log."
    (folder/"paper.tex").write_text(text)
    for _ in range(1 if TEX == "tectonic" else 2):
        done = subprocess.run([TEX, *([] if TEX == "tectonic" else ["-interaction=nonstopmode", "-halt-on-error"]), "paper.tex"], cwd=folder, capture_output=True, text=True, errors="replace", timeout=300)
    return done


@pytest.mark.skipif(TEX is None, reason="there is no TeX here (pdflatex, xelatex, lualatex or tectonic)")
def test_it_compiles(tmp_path):
    body = "\n".join(table.to_latex(f"tab:{name}") for name, table in tables().items())
    done = compiled(ARTICLE % body, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path/"paper.pdf").stat().st_size > 1000
    assert "undefined" not in done.stdout.lower(), "a reference to a table was not found"


@pytest.mark.skipif(TEX is None, reason="there is no TeX here (pdflatex, xelatex, lualatex or tectonic)")
def test_a_broken_table_would_be_noticed(tmp_path):
    broken = grouped_table(study()).to_latex("tab:main").replace(r"\end{tabular}", "", 1)
    assert compiled(ARTICLE % broken, tmp_path).returncode != 0
