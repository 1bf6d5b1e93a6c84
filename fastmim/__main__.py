"""``python -m fastmim`` is the ``fastmim`` command; so is this file, for launchers that were not told ``--module``."""

import sys
from pathlib import Path

if __name__ == "__main__":
    own = Path(__file__).resolve().parent
    if not __package__:
        # Started as a script: Python has put this folder on its path, where our modules would stand before others'.
        sys.path[:] = [str(own.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != own)]
    from fastmim.cli import entry as run

    run()
