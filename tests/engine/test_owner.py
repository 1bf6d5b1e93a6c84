"""One run, one folder: living owners are refused, dead ones are followed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from fastmim.engine import owner
from fastmim.engine.owner import LOCK_FILE, owned

HOLD = """
import sys
from pathlib import Path
from fastmim.engine.owner import owned
with owned(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


@pytest.mark.parametrize("kernel_locks", [True, False])
def test_a_living_owner_is_named_and_a_killed_one_followed(tmp_path, holder, monkeypatch, kernel_locks):
    if not kernel_locks:  # a file system without them
        monkeypatch.setattr(owner, "_lock", lambda descriptor: None)
    with pytest.raises(ValueError, match=f"process {holder.pid} on {socket.gethostname()} .* writes there"):
        owned(tmp_path).__enter__()
    holder.kill()  # not waited for: a zombie is dead too
    while owner._started(holder.pid):
        pass
    with owned(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_clean_end_and_an_error_release_it(tmp_path, holder):
    holder.communicate("", timeout=400)
    with pytest.raises(KeyError), owned(tmp_path):
        raise KeyError
    with owned(tmp_path):
        pass


def test_another_host_is_refused_with_the_way_out(tmp_path):
    (tmp_path / LOCK_FILE).write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "then"}))
    with pytest.raises(ValueError, match=f"process 1 on elsewhere .* delete {tmp_path / LOCK_FILE}"):
        owned(tmp_path).__enter__()
    (tmp_path / LOCK_FILE).unlink()
    with owned(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00" * 5000, '{"pid": -1}', '{"pid": 1e400}'])
@pytest.mark.parametrize("kernel_locks", [True, False])
def test_a_file_cut_off_by_a_kill_owns_nothing(tmp_path, monkeypatch, text, kernel_locks):
    if not kernel_locks:
        monkeypatch.setattr(owner, "_lock", lambda descriptor: None)
    text = text.replace("{\"pid", f'{{"host": "{socket.gethostname()}", "pid')
    (tmp_path / LOCK_FILE).write_text(text)
    with owned(tmp_path):
        pass


def test_a_process_id_that_was_given_anew_is_not_the_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "_lock", lambda descriptor: None)
    stale = {"host": socket.gethostname(), "pid": os.getppid(), "started": "1"}
    (tmp_path / LOCK_FILE).write_text(json.dumps(stale))
    with owned(tmp_path):
        pass
    (tmp_path / LOCK_FILE).write_text(json.dumps(stale | {"started": owner._started(os.getppid())}))
    with pytest.raises(ValueError, match="writes there"):
        owned(tmp_path).__enter__()


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_what_is_no_plain_file_is_refused(tmp_path, kind):
    path, aim = tmp_path / LOCK_FILE, tmp_path / "aim"
    {"link": lambda: path.symlink_to(aim), "folder": path.mkdir, "fifo": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(ValueError, match="cannot be written"):
        owned(tmp_path).__enter__()
    assert not aim.exists()


def test_a_folder_deleted_in_the_meantime_is_no_error(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with owned(folder):
        (folder / LOCK_FILE).unlink()
        folder.rmdir()
