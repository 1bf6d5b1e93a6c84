"""One run, one ``output.dir``: a lock file that names the host and the process which write there."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastmim.engine.checkpoint.save import clean_unfinished

LOCK_FILE = ".owner.json"
_FOLDERS = ("checkpoints", "reconstructions", "tensorboard", "wandb", "mlflow")
_FILES = (
    "config.yaml", "metrics.jsonl", "metrics.csv", "loggers.json", "bad_files.json", "encoder.safetensors",
    "config.json", "loss.png", "classes.json", "best.safetensors", "best_ema.safetensors", "encoder_ema.safetensors",
)  # fmt: skip


def make_folder(folder: Path) -> None:
    """Create ``output.dir``.

    Raises:
        ValueError: it is a file, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "is a file" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
        raise ValueError(f"output.dir={folder}: cannot be created ({reason}); choose another folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output.dir={folder}: cannot be written to; choose another folder")


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Create ``output.dir``, own it for the duration of the block, and remove what a killed run left half written.

    Raises:
        ValueError: it, or a folder in it, cannot be written to, another run writes there, or something else has the
            name of what a run leaves there.
    """
    make_folder(folder)
    with owned(folder):
        _check_places(folder)
        clean_unfinished(folder / "checkpoints")
        for place in (folder, folder / "reconstructions"):
            for left in [*place.glob("*.partial"), *place.glob("*.tmp")]:
                left.unlink(missing_ok=True)
        yield


def _check_places(folder: Path) -> None:
    """What a run would find out at its end only."""
    for name in _FOLDERS:
        place = folder / name
        if place.exists() and not place.is_dir():
            raise ValueError(f"output.dir={folder}: {name} in it is no folder; move it, or choose another output.dir")
        if place.exists() and not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"output.dir={folder}: {name} in it cannot be written to; choose another output.dir")
    for name in _FILES:
        if (folder / name).is_dir():
            raise ValueError(f"output.dir={folder}: {name} in it is a folder; move it, or choose another output.dir")


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own a folder for the duration of the block; the lock of a process that died on this host is taken over.

    Raises:
        ValueError: another process writes there, or one of another host may; with the way out.
    """
    path = folder / LOCK_FILE
    try:
        descriptor = _take(path, folder)
    except OSError as error:
        reason = (error.strerror or "unusable").lower()
        raise ValueError(f"output.dir={folder}: {path} cannot be written ({reason}); choose another folder") from None
    try:
        yield
    finally:
        if _is(descriptor, path):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False  # the folder has gone


def _take(path: Path, folder: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        try:
            _claim(descriptor, path, folder)
            # The last owner may have removed the file between the two calls above.
            if _is(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _claim(descriptor: int, path: Path, folder: Path) -> None:
    owner, free = _read(descriptor), _lock(descriptor)
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} (since {owner.get('since', '?')})"
    if free is False or (free is None and _alive(owner)):
        raise ValueError(f"output.dir={folder}: {who} writes there; wait for it, or choose another output.dir")
    if owner and owner.get("host") != socket.gethostname():
        raise ValueError(f"output.dir={folder}: {who} has not given it back; if it no longer runs, delete {path}")
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(mine).encode(), 0)


def _lock(descriptor: int) -> bool | None:
    """Take the kernel's lock: False where another process holds it, None where the file system has none.

    POSIX record locks: data workers do not inherit them, and the kernel frees them at any death.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _read(descriptor: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}  # cut off by a kill, or by another program
    return owner if isinstance(owner, dict) else {}


def _alive(owner: dict[str, Any]) -> bool:
    """Whether the owner is another process that runs on this host; a process id that was given anew is not."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return owner.get("started") == _started(pid)


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty for a dead one, or where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]
