"""A small model for a task with few labels:  accelerate launch tools/transfer.py --cfg transfer/digits.yaml"""

import argparse
import sys
from pathlib import Path

from proteus.config_files import load_config
from proteus.engine.compiled import keep_compiled
from proteus.errors import FAILURES, Stopped, say
from proteus.transfer.config import TransferConfig


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 the run had to stop, 2 bad input, 128 + n stopped by signal n."""
    parser = argparse.ArgumentParser(
        prog="transfer.py",
        description="Adapt a teacher to a task, transfer its predictions to a student, fine-tune the student.",
    )
    parser.add_argument("--cfg", required=True, help="a YAML file, or the name of one under configs/")
    parser.add_argument(
        "--compare",
        metavar="METHODS",
        help="all, or some of oriented,single_stage,agnostic,contrastive,scratch,pretrained-<name>, under run.seeds "
        "seeds each; without it task-oriented transfer alone, under one",
    )
    parser.add_argument(
        "--write-splits",
        metavar="DIR",
        type=Path,
        help="write links to the labelled, validation and test images below DIR, for tools/retrieve.py, and stop",
    )
    parser.add_argument("override", nargs="*", help="key=value, such as target.train.per_class=5")
    args = parser.parse_intermixed_args(argv)
    keep_compiled()
    try:
        cfg = load_config(args.cfg, args.override, TransferConfig)
        # Importing torch takes seconds: what is wrong with the config is said before.
        from accelerate import PartialState

        from proteus.engine.peers import peers_needed
        from proteus.transfer.pipeline import choose_methods, transfer
        from proteus.transfer.preflight import check_inputs
        from proteus.transfer.splits import write_splits
        from proteus.transfer.target import open_target

        methods = choose_methods(cfg, "oriented" if args.compare is None else args.compare)
        if args.write_splits:
            for name, count in write_splits(open_target(cfg, cfg.run.seed), args.write_splits).items():
                print(f"{args.write_splits / name}: {count} images")
            return 0
        check_inputs(cfg)
        seeds = cfg.run.seeds if args.compare else 1
        with peers_needed():
            transfer(cfg, methods, list(range(cfg.run.seed, cfg.run.seed + seeds)))
        PartialState().destroy_process_group()
    except FAILURES as error:
        return say(error, about="run.dir")
    except Stopped as stop:
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what is done", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
