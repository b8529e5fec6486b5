"""What two processes make of the halves of the reference's batch: started by the launcher, writes losses and gradients."""

import sys

import numpy as np

from paddlemix.training.processes import Processes
from tests.models.internvl.helpers import fresh, gradients, load, loss_inputs, retrieval_inputs


def main(folder):
    processes = Processes()
    rows = slice(2 * processes.rank, 2 * processes.rank + 2)
    model = fresh()
    found = {}
    for name in ("itc", "itm", "itg", "distinct", "shared"):
        if name in ("distinct", "shared"):
            ids = load().expected["retrieval_loss"][name]["image_ids"]
            loss = model.retrieval_loss(**retrieval_inputs(ids, rows)).loss
        else:
            loss = getattr(model.loss(**loss_inputs(rows)), f"loss_{name}")
        found[f"{name}/loss"] = float(loss)
        found |= {f"{name}/{key}": value for key, value in gradients(model, loss).items()}
    np.savez(f"{folder}/{processes.rank}.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1])
