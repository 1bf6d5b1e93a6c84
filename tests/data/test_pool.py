"""Worker processes: what is lost is noticed, what is crashed is replaced, and nothing waits for ever."""

from __future__ import annotations

import errno
import itertools
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastmim.data import build_loader, check_images
from fastmim.data import decode as decoding
from fastmim.data import pool as pools
from fastmim.data.memory_file import pack, unpack
from fastmim.data.notes import noted
from fastmim.data.pool import WorkerPool, nothing_held
from fastmim.data.worker_error import DataWorkerError, WaitInterrupted

OPTIONS = dict(img_size=(16, 16), micro_batch_size=4, verify="none")


class Squares:
    """Item i is a tensor of i squares; ``do`` comes before each."""

    def __init__(self, do=lambda dataset, i: None) -> None:
        self.known_bad: frozenset[int] = frozenset()
        self.holding = nothing_held
        self.do = do

    def __getitem__(self, i: int) -> tuple[int, torch.Tensor]:
        self.do(self, i)
        return i, torch.arange(i, dtype=torch.int64) ** 2


def pool_of(dataset, workers=2, crashed=lambda file, reason: None) -> WorkerPool:
    return WorkerPool(dataset, workers, ahead=3, label=lambda file: f"file {file}", crashed=crashed)


def die_of(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)  # pytest's own handler would print where it came from
    os.kill(os.getpid(), number)


def children() -> set[int]:
    return {child.pid for child in multiprocessing.active_children()}


@pytest.mark.parametrize("workers", (1, 3))
def test_items_come_in_order_and_again(workers):
    with closing(pool_of(Squares(), workers)) as pool:
        for start in (0, 5):  # the second leaves the answers of the first behind
            for i, (number, squares) in zip(range(start, 25), pool.items(itertools.count(start)), strict=False):
                assert number == i and torch.equal(squares, torch.arange(i) ** 2)
        assert len(list(pool.items(iter(range(7))))) == 7
    assert not children()


def test_every_tensor_survives_the_way(tmp_path):
    kinds = [torch.zeros(()), torch.empty(0, 3), torch.arange(6).reshape(2, 3).t(), torch.ones(5, dtype=torch.bool)]
    kinds.append(torch.randn(3, 5).to(torch.bfloat16))
    with open(tmp_path / "slot", "w+b", buffering=0) as file:
        size = pack(file.fileno(), ("item", {"all": kinds, "text": "é"}))
        kind, value = unpack(file.fileno(), size, False)
    assert kind == "item" and value["text"] == "é"
    for sent, got in zip(kinds, value["all"], strict=True):
        assert sent.dtype == got.dtype and torch.equal(sent, got)


@pytest.mark.parametrize("number", sorted(pools._CRASHES))
def test_a_crashed_worker_is_replaced_and_its_file_reported(number):
    def crash(dataset, i):
        dataset.holding(100 + i)
        if i in (3, 8) and 100 + i not in dataset.known_bad:
            die_of(number)

    crashed: dict[int, str] = {}
    with closing(pool_of(Squares(crash), 2, crashed.__setitem__)) as pool:
        assert [i for i, _ in pool.items(iter(range(12)))] == list(range(12))
    name = signal.Signals(number).name
    assert crashed == {103: f"its decoder crashed ({name})", 108: f"its decoder crashed ({name})"}


def test_a_worker_that_crashes_with_no_file_in_hand_is_replaced(caplog):
    crashed: dict[int, str] = {}
    quiet = Squares(lambda dataset, i: signal.signal(signal.SIGSEGV, signal.SIG_DFL))
    with closing(pool_of(quiet, 2, crashed.__setitem__)) as pool, caplog.at_level(logging.WARNING, "fastmim"):
        items = pool.items(iter(range(40)))
        got = [next(items)[0] for _ in range(4)]
        for pid in children():
            os.kill(pid, signal.SIGSEGV)
        assert got + [i for i, _ in items] == list(range(40))
    assert not crashed and caplog.text.count("with no file in hand: replaced") == 2


def test_endless_crashes_end_the_run():
    def crash_on_all(dataset, i):
        dataset.holding(len(dataset.known_bad))
        die_of(signal.SIGSEGV)

    crashed: dict[int, str] = {}
    message = "killed by signal SIGSEGV while it read file 16"
    pool = pool_of(Squares(crash_on_all), 1, crashed.__setitem__)
    with closing(pool), pytest.raises(DataWorkerError, match=message):
        next(pool.items(iter(range(2))))
    assert len(crashed) == pools._MOST_CRASHES


@pytest.mark.parametrize(
    ("error", "message"),
    (
        (OSError(errno.EMFILE, "Too many open files"), "too many open files; raise `ulimit -n`"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on device; use fewer data.num_workers"),
        (MemoryError(), "memory is full; use fewer data.num_workers"),
        (KeyError("what\nnot"), "KeyError: 'what"),
    ),
)  # fmt: skip
def test_what_fails_in_a_worker_is_one_line(error, message):
    def fail(dataset, i):
        raise error

    pool = pool_of(Squares(fail))
    with closing(pool), pytest.raises(DataWorkerError, match=f"a data worker failed: {message}") as caught:
        next(pool.items(iter(range(2))))
    assert "\n" not in str(caught.value) and not children()


def test_a_worker_that_leaves_is_noticed():
    pool = pool_of(Squares(lambda dataset, i: os._exit(3)))
    with closing(pool), pytest.raises(DataWorkerError, match="ended with status 3"):
        next(pool.items(iter(range(2))))


def test_waiting_ends_when_the_run_is_to_stop(monkeypatch, caplog):
    monkeypatch.setattr(pools, "_PATIENCE", 0.1)
    monkeypatch.setattr(pools, "_SLOW", 0.1)

    def hang(dataset, i):
        dataset.holding(7)
        time.sleep(1000)

    with closing(pool_of(Squares(hang))) as pool, caplog.at_level(logging.WARNING, "fastmim"):
        pool.stop = lambda: bool(caplog.records)
        with pytest.raises(WaitInterrupted, match="no data has come"):
            next(pool.items(iter(range(2))))
    assert "being read: file 7" in caplog.text
    assert not children()


def test_ctrl_c_while_waiting(request):
    def interrupt(dataset, i):
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(1000)

    # A shell's background job, as a run of all tests may be one, starts with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with closing(pool_of(Squares(interrupt), 1)) as pool, pytest.raises(KeyboardInterrupt):
        next(pool.items(iter(range(2))))
    assert not children()


def test_workers_do_not_heed_the_signals_of_the_group():
    with closing(pool_of(Squares(), 2)) as pool:
        items = pool.items(itertools.count())
        next(items)
        for pid in children():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(pid, number)
        assert [next(items)[0] for _ in range(20)] == list(range(1, 21))


def test_too_few_file_handles(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 16
    before = used
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 12, hard))
    try:
        with pytest.raises(DataWorkerError, match=r"8 data workers cannot be started: too many open files.*ulimit -n"):
            pool_of(Squares(), 8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not children()
    if os.path.isdir("/proc/self/fd"):
        assert len(os.listdir("/proc/self/fd")) == before  # nothing is left open


# Through the loaders.


def crash_on(monkeypatch, content: bytes, number: int = signal.SIGSEGV) -> None:
    """A decoder that a certain file kills, in whichever process."""
    decode = decoding.jpeg_frame

    def deadly(data):
        if bytes(data) == content:
            die_of(number)
        return decode(data)

    monkeypatch.setattr(decoding, "jpeg_frame", deadly)


@pytest.mark.parametrize("loader", ("torchvision", "pil", "dali"))
def test_a_run_goes_on_without_the_file_that_crashes_a_decoder(photos, tmp_path, monkeypatch, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    root = Path(shutil.copytree(photos, tmp_path / "photos"))
    deadly = root / "011.jpg"
    options = OPTIONS | dict(path=root, loader=loader, num_workers=2)
    with monkeypatch.context() as patch:
        crash_on(patch, deadly.read_bytes())
        with build_loader(**options) as images:
            # met when values are looked at, before training
            assert images.bad_files == {str(deadly): "its decoder crashed (SIGSEGV)"}
        patch.setattr("fastmim.data.build.survey", lambda *_args, **_options: [])
        with build_loader(**options) as images:
            assert images.bad_files == {}
            batches = list(images.epoch(0)) + list(images.epoch(1))
        assert images.bad_files == {str(deadly): "its decoder crashed (SIGSEGV)"}
        assert check_images(root) == (36, images.bad_files)
        with build_loader(**options | dict(verify="full")) as verified:
            assert verified.bad_files == images.bad_files
    # the same batches as with a file there that is plainly bad
    deadly.write_bytes(b"no image")
    with build_loader(**options) as images:
        for got, truth in zip(batches, list(images.epoch(0)) + list(images.epoch(1)), strict=True):
            assert torch.equal(got.images, truth.images) and torch.equal(got.sample_ids, truth.sample_ids)


def test_a_machine_that_is_out_of_handles_does_not_make_files_bad(photos, monkeypatch):
    def no_handles(*_args, **_kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("fastmim.data.source.read_bytes", no_handles)
    with pytest.raises(ChildProcessError, match="too many open files; raise `ulimit -n`"):
        build_loader(path=photos, num_workers=0, **OPTIONS)  # when values are looked at
    monkeypatch.setattr("fastmim.data.build.survey", lambda *_args, **_options: [])
    for workers in (0, 2):
        with build_loader(path=photos, num_workers=workers, **OPTIONS) as images:
            with pytest.raises(ChildProcessError, match="too many open files; raise `ulimit -n`"):
                next(images.epoch(0))
            assert not images.bad_files


def test_batches_do_not_go_through_shared_memory_by_name(photos, tmp_path):
    # as in a container with a /dev/shm of 64 KiB: 24 MiB under way, and not one file there
    lines = f"""
import os
from fastmim.data import build_loader
before = set(os.listdir("/dev/shm"))
options = dict(img_size=(512, 512), micro_batch_size=4, num_workers=2, verify="none")
with build_loader(path={str(photos)!r}, **options) as images:
    count = sum(1 for _ in images.epoch(0))
    assert set(os.listdir("/dev/shm")) <= before, os.listdir("/dev/shm")
print(count)
"""
    if not os.path.isdir("/dev/shm"):
        pytest.skip("this system has no /dev/shm")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout == "9\n", done.stderr


# What decoders say beside their pixels.


def extraneous(photo: Path) -> bytes:
    """A JPEG with bytes too many in its scan: libjpeg gives every pixel, and a warning."""
    data = photo.read_bytes()
    return data[: len(data) * 2 // 3] + bytes(40) + data[len(data) * 2 // 3 :]


@pytest.mark.parametrize("workers", (0, 2))
def test_libjpegs_warning_names_the_file(photos, tmp_path, caplog, capfd, workers):
    root = Path(shutil.copytree(photos, tmp_path / "photos"))
    odd = root / "005.jpg"
    odd.write_bytes(extraneous(odd))
    with caplog.at_level(logging.WARNING, "fastmim"):
        with build_loader(path=root, num_workers=workers, **OPTIONS) as images:
            for epoch in range(2):
                list(images.epoch(epoch))
            said = images.noted_files
        assert not images.bad_files and check_images(root) == (37, {})
    assert list(said) == [str(odd)] and said[str(odd)].startswith("Corrupt JPEG data: 22 extraneous bytes")
    assert caplog.text.count(f"image used as its decoder gives it: {odd}: Corrupt JPEG data") == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "Corrupt JPEG" in line]
    assert all(str(odd) in line for line in lines)  # not a second time, without a name


@pytest.mark.parametrize("workers", (0, 1))
def test_pils_warning_names_the_file(photos, tmp_path, monkeypatch, workers):
    # PIL warns of an image above its limit, and refuses one above twice the limit
    shutil.copy(photos / "000.jpg", tmp_path)
    with Image.open(photos / "000.jpg") as image:
        image.save(tmp_path / "large.bmp")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", image.width * image.height * 2 // 3)
    with build_loader(path=tmp_path, num_workers=workers, **OPTIONS | dict(micro_batch_size=2)) as images:
        list(images.epoch(0))
    assert list(images.noted_files) == [str(tmp_path / "large.bmp")]
    assert "decompression bomb" in images.noted_files[str(tmp_path / "large.bmp")]


def test_what_others_write_to_standard_error_is_passed_on(capfd):
    with noted() as said:
        os.write(2, b"somebody else's line\nCorrupt JPEG data: bad Huffman code\n")
        warnings.warn("a library's", stacklevel=1)
        warnings.warn("of the code, not of the file", DeprecationWarning, stacklevel=1)
    assert said == ["Corrupt JPEG data: bad Huffman code", "a library's"]
    assert capfd.readouterr().err == "somebody else's line\n"
