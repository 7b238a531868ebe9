"""LightlyTrain's side of `benchmarks.speed.peer`: runs in an environment of its own and imports nothing of ours.

python peer_child.py '{"root": ..., "out": ..., "model": ..., ...}'

It trains by `lightly_train.pretrain`, waits for a line on its standard input before each step, and answers with a line:
first the versions, then the seconds of each step. A step is timed between Lightning's own hooks: from the batch being
there to the end of the optimiser's step.
"""

import json
import os
import sys
import time
from importlib.metadata import version


def main() -> None:
    """Train until the standard input ends."""
    asked = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer

    import torch
    from lightly_train import pretrain
    from lightly_train._methods.method import Method
    from lightly_train._methods.method_helpers import get_method_cls

    torch.set_num_threads(asked["threads"])
    before, after, began = Method.on_train_batch_start, Method.on_train_batch_end, [0.0]
    facts = {name: version(name) for name in ("lightly_train", "torch", "pytorch_lightning")}
    print(json.dumps(facts | {"method": get_method_cls(asked["method"]).__name__}), file=answers)

    def start(self, *args, **kwargs):
        before(self, *args, **kwargs)
        if not sys.stdin.readline():
            os._exit(0)
        began[0] = time.perf_counter()

    def end(self, *args, **kwargs):
        print(json.dumps(time.perf_counter() - began[0]), file=answers)
        after(self, *args, **kwargs)

    Method.on_train_batch_start, Method.on_train_batch_end = start, end
    pretrain(
        out=asked["out"],
        data=asked["root"],
        model=asked["model"],
        method=asked["method"],
        method_args={"teacher": asked["teacher"]},
        batch_size=asked["batch"],
        precision=asked["precision"],
        epochs=1_000_000,
        num_workers=0,
        accelerator="cpu",
        devices=1,
        callbacks={"model_checkpoint": None},
    )


if __name__ == "__main__":
    main()
