"Results that are the same but for rounding: a fit may be made in other company, by other instructions of the processor."
import math


def alike(a, b, where="results"):
    "Assert that two JSON-like values are equal, numbers up to a millionth."
    if isinstance(a, float) and isinstance(b, float): assert math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-7), (where, a, b)
    elif isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys(), where
        for k in a: alike(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)): alike(x, y, f"{where}[{i}]")
    else: assert a == b, (where, a, b)
