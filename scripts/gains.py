"What a model gains over one that does not look at the data, family by family, as a CSV for a page."
import argparse
from pathlib import Path

from causal_meta.analysis.studies import gather
from causal_meta.datasets.validation import one_of
from causal_meta.runners.runs import find_run, write_atomic

TASK = ["family", "factor", "d", "n", "seed_list", "index"]


def gains(run, model, chance):
    "Means over a family's tasks, with the standard error of the gain."
    frame = gather(run).frame
    models = list(dict.fromkeys(frame["model"]))
    own, other = (frame[frame["model"] == one_of(m, models, "model of this run")].set_index(TASK) for m in (model, chance))
    own = own.assign(gain=own["edge_log_prob_mean"] - other["edge_log_prob_mean"])
    return own.groupby(TASK[:4], sort=False).agg(tasks=("gain", "count"), gain=("gain", "mean"), gain_se=("gain", "sem"),
                                                 **{m: (m, "mean") for m in ("edge_log_prob_mean", "auroc", "ece", "e_shd_normalised")}).reset_index()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--model", default="pretrained")
    parser.add_argument("--chance", default="random")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    write_atomic(asked.out, gains(find_run(asked.run).path, asked.model, asked.chance).round(5).to_csv(index=False))
    print(f"wrote {asked.out}")
