"""Compute a teacher's targets once:  accelerate launch tools/cache.py --cfg proteus_s14.yaml teacher_cache.dir=DIR"""

import argparse
import sys

from proteus.config_files import load_config
from proteus.engine.compiled import keep_compiled
from proteus.errors import FAILURES, InputError, say


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 it had to stop, 2 bad input or not confirmed, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="cache.py",
        description="Keep what the teachers say about fixed views of every image, for runs with the same config. "
        "The same command goes on where it was stopped.",
    )
    parser.add_argument("--cfg", required=True, help="a YAML file, or the name of one under configs/")
    parser.add_argument("--yes", action="store_true", help="write without asking")
    parser.add_argument("--check", type=int, metavar="N", help="measure a finished cache's error again, on N views")
    parser.add_argument("override", nargs="*", help="key=value, such as teacher_cache.dir=/data/cache")
    args = parser.parse_intermixed_args(argv)
    keep_compiled()
    try:
        cfg = load_config(args.cfg, args.override)
        if cfg.teacher_cache is None:
            raise InputError("teacher_cache.dir is not set: teacher_cache.dir=DIR is where the cache is to be")
        if args.check is not None and args.check < 1:
            raise InputError(f"--check {args.check}: a number of views above 0")
        # Importing torch takes seconds: what is wrong with the config is said before.
        from accelerate import PartialState

        from proteus.engine.peers import peers_needed
        from proteus.training.cache_writer import make_cache
        from proteus.training.preflight import check_inputs

        check_inputs(cfg, "auto")
        with peers_needed():
            make_cache(cfg, args.yes, args.check)
        PartialState().destroy_process_group()
    except FAILURES as error:
        return say(error, about="teacher_cache.dir")
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what is done", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
