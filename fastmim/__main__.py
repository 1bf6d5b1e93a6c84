"""``python -m fastmim`` is the ``fastmim`` command."""

from fastmim.cli import entry

if __name__ == "__main__":
    entry()
