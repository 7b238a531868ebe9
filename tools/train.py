"""Distil a teacher into a student:  accelerate launch tools/train.py --cfg proteus_l14.yaml data.root=/data/imagenet"""

import argparse
import sys

from proteus.config_files import load_config
from proteus.engine.compiled import keep_compiled
from proteus.errors import FAILURES, say


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 the run had to stop, 2 bad input, 128 + n stopped by signal n."""
    parser = argparse.ArgumentParser(prog="train.py", description="Distil a frozen teacher into a smaller student.")
    parser.add_argument("--cfg", required=True, help="a YAML file, or the name of one under configs/")
    parser.add_argument("--resume", default="auto", help="auto (go on in run.dir), never, or a checkpoint folder")
    parser.add_argument("--plan", action="store_true", help="say what the run would cost, and do not start it")
    parser.add_argument("override", nargs="*", help="key=value, such as run.batch_size=64")
    args = parser.parse_intermixed_args(argv)
    keep_compiled()
    try:
        cfg = load_config(args.cfg, args.override)
        # Importing torch takes seconds: what is wrong with the config is said before.
        from accelerate import PartialState

        from proteus.engine.peers import peers_needed
        from proteus.training.loop import train
        from proteus.training.preflight import check_inputs

        check_inputs(cfg, args.resume)
        if args.plan:
            from proteus.training.estimate import estimate

            lines, signum = estimate(cfg), 0
            if PartialState().is_main_process:
                print("\n".join(lines))
        else:
            with peers_needed():
                signum = train(cfg, args.resume)
        PartialState().destroy_process_group()
    except FAILURES as error:
        return say(error, about="run.dir")
    except KeyboardInterrupt:  # before the first step, or after the last
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 128 + signum if signum else 0


if __name__ == "__main__":
    sys.exit(main())
