"""Train, run, compare and trust posteriors over causal graphs.

`import causal_meta` loads nothing heavy; the names below are fetched from their modules when first used."""
__version__ = "0.1.0"

_WHERE = {"posterior": "ask", "describe": "ask", "find_method": "ask", "decide": "decisions", "load_pretrained": "runners.pretrained",
          "pretrained_names": "runners.pretrained", "export_pretrained": "runners.pretrained",
          "Posterior": "models.base", "Budget": "models.base", "MODELS": "models.base", "build_model": "models.base",
          "read_table": "datasets.tables", "load_sachs": "datasets.real", "standardise": "datasets.streams",
          "benchmarks": "datasets.benchmarks", "load_benchmark": "datasets.benchmarks",
          "InputError": "datasets.validation", "load_config": "runners.config", "create_run": "runners.runs", "find_run": "runners.runs",
          "run_pipeline": "pipeline", "posterior_metrics": "metrics.summary", "collect": "analysis.collect"}
__all__ = ["__version__", *_WHERE]


def __getattr__(name):
    if name not in _WHERE: raise AttributeError(f"module 'causal_meta' has no attribute '{name}'")
    from importlib import import_module
    return getattr(import_module(f"causal_meta.{_WHERE[name]}"), name)


def __dir__(): return sorted(__all__)
