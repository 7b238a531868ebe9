"""Where compiled code is kept."""

import os
from pathlib import Path


def keep_compiled() -> None:
    """Let torch keep what it compiles beyond a reboot, for the next start; TORCHINDUCTOR_CACHE_DIR says where else.

    To be called before torch is imported, which settles on a folder that reboots empty.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "proteus" / "inductor"))
