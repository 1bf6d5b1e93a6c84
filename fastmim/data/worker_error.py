"""Why data workers cannot go on, and what helps: one line each."""

from __future__ import annotations

import errno
import signal

from fastmim.wording import plural

#: Of the machine, not of a file: a file that cannot be read for one of these is not bad.
MACHINE_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC})


class DataWorkerError(ChildProcessError, RuntimeError):
    """The data workers cannot go on; the message is the cause and the fix, in one line."""


class WaitInterrupted(DataWorkerError):
    """The run is to stop, and the next item does not come."""


def with_fix(err: OSError) -> str:
    """The reason of the system, and what helps."""
    text = err.strerror or str(err)
    if err.errno in (errno.EMFILE, errno.ENFILE):
        return f"{text.lower()}; raise `ulimit -n`, or use fewer data.num_workers"
    if err.errno in (errno.ENOMEM, errno.ENOSPC):
        return f"{text.lower()}; use fewer data.num_workers or a smaller train.micro_batch_size"
    return text


def cannot_start(err: OSError, count: int) -> str:
    """The message when so many workers cannot be started."""
    fix = with_fix(err)
    if err.errno == errno.EAGAIN:
        fix = "too many processes; raise `ulimit -u`, or use fewer data.num_workers"
    return f"{plural(count, 'data worker')} cannot be started: {fix}"


def why_dead(code: int | None, pid: int | None, in_hand: str) -> str:
    """The message for a worker that is gone; `code` is its exit status, `in_hand` the file that it was reading."""
    if code is None:
        how = "does not answer"
    elif code < 0:
        known = {number.value: number.name for number in signal.Signals}  # not those of the real-time range
        how = f"was killed by signal {known.get(-code, -code)}"
    else:
        how = f"ended with status {code}"
    cause = ": most often memory is full" if code == -signal.SIGKILL else ""
    reading = f" while it read {in_hand}" if in_hand else ""
    return (
        f"a data worker process (pid {pid}) {how}{reading}{cause};"
        " use fewer data.num_workers (0 shows the error itself)"
    )
