"""The command line: what it prints, where, and with which exit status."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from fastmim import __version__, cli
from fastmim.config import load_config
from fastmim.data.scan import scan_folder
from fastmim.engine.run import LostFolderError

ROOT = Path(__file__).resolve().parents[1]
# What torch says of a tensor that no machine holds.
with pytest.raises(RuntimeError) as _caught:
    torch.empty(1 << 50, dtype=torch.uint8, device="cpu")
TOO_LARGE = _caught.value
DEMO = str(ROOT / "configs/demo.yaml")


@pytest.fixture(autouse=True)
def _own_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """main() configures the fastmim logger; other tests want it as it was."""
    log = logging.getLogger("fastmim")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "level", log.level)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(argv)
    return status, *capsys.readouterr()


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a user error."""
    status, out, err = run(capsys, *argv)
    assert status == 2 and out == ""
    assert err.startswith("fastmim: error: ") and err.count("\n") == 1
    return err


def python_m(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, **env}
    command = [sys.executable, "-m", "fastmim", *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"fastmim {__version__}\n"


def test_python_m() -> None:
    result = python_m("--version")
    assert (result.returncode, result.stdout) == (0, f"fastmim {__version__}\n")


@pytest.mark.parametrize("script", ["fastmim", "fastmim/__main__.py"])
def test_started_as_a_script(script: str) -> None:
    """As ``deepspeed`` does without ``--module``: Python puts the script's folder where it finds modules first."""
    command = [sys.executable, script, "config", "show", "configs/demo.yaml"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and done.stdout.startswith("model:"), done.stderr


def test_the_wrong_file_as_a_script_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "fastmim/cli.py", "pretrain"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("fastmim: error: fastmim/cli.py is not the command; start ")


def test_no_module_of_ours_stands_before_one_of_python() -> None:
    own = {path.stem for path in (ROOT / "fastmim").iterdir() if path.suffix in ("", ".py")}
    assert not own & set(sys.stdlib_module_names)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(word in out for word in ("pretrain", "config", "data", "examples:", "torchrun"))


@pytest.mark.parametrize("argv", [[], ["pretrian"], ["config"], ["data"], ["pretrain"]])
def test_usage_errors(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2 and "usage: fastmim" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, missing",
    [(["convert", "run"], "DST"), (["config", "show"], "CONFIG"), (["features"], "RUN|ENCODER, IMAGES, --out")],
)
def test_only_what_is_required_is_said_to_be(argv: list[str], missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(argv)
    assert capsys.readouterr().err.endswith(f"the following arguments are required: {missing}\n")


def test_config_show_is_the_resolved_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(capsys, "config", "show", DEMO, "train.steps=7", "optim.lr=1e-4")
    assert (status, err) == (0, "")
    tree = yaml.safe_load(out)
    assert (tree["train"]["steps"], tree["optim"]["lr"]) == (7, 1e-4)
    (tmp_path / "shown.yaml").write_text(out)
    assert load_config(tmp_path / "shown.yaml") == load_config(DEMO, ["train.steps=7", "optim.lr=1e-4"])


@pytest.mark.parametrize("argv", [["config", "keys"], ["config", "show", DEMO, "--explain"]])
def test_every_key_is_explained(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, *argv)
    assert status == 0
    assert "# images per rank in one forward and backward (integer; default 64)" in out


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["config", "show", "no-such.yaml"], "no-such.yaml: no such file"),
        (
            ["config", "show", DEMO, "model.img_size=98"],
            "model.img_size=98: not divisible by patch_size 4; use 96",
        ),
        (["config", "show", DEMO, "trian.steps=3"], "trian: unknown key; did you mean 'train'"),
        (["config", "show", DEMO, "optim.lr=-1"], "optim.lr=-1: must be >= 0"),
        (["config", "show", DEMO, "nonsense"], "expected section.key=value"),
        (["config", "show", DEMO, "--train.steps=3"], "config keys take no dashes: train.steps=3"),
        (["config", "show", DEMO, "--fast"], "unknown option --fast"),
        (["pretrain", DEMO, "data.path=null"], "data.path=null: give a folder of images"),
        (["pretrain", str(ROOT / "configs/simmim/swin_base_100ep.yaml")], "data.path=null: give a folder"),
    ],
)
def test_user_errors_are_one_line(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, *argv)


def test_the_process_exits_with_2_and_no_traceback() -> None:
    result = python_m("pretrain", DEMO, "model.img_size=100", "model.patch_size=16")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == (
        "fastmim: error: model.img_size=100: not divisible by patch_size 16; use 96 or 112\n"
    )


def test_data_folders_that_cannot_be_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = f"output.dir={tmp_path / 'out'}"
    assert "missing" in refused_last_line(capsys, "pretrain", DEMO, out, f"data.path={tmp_path / 'missing'}")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused_last_line(capsys, "pretrain", DEMO, out, f"data.path={tmp_path / 'empty'}")


def test_an_output_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("x")
    Image.new("RGB", (120, 120)).save(tmp_path / "a.png")
    argv = ["pretrain", DEMO, "train.steps=1", f"data.path={tmp_path}", "data.val_path=null"]
    tiny = ["model.depths=[1, 1]", "model.num_heads=[1, 1]", "model.embed_dim=8", "train.micro_batch_size=1"]
    error = refused_last_line(capsys, *argv, *tiny, f"output.dir={tmp_path / 'a_file' / 'run'}")
    assert "a_file" in error


def refused_last_line(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """As refused(), after any lines of log."""
    status, _, err = run(capsys, *argv)
    line = err.splitlines()[-1]
    assert status == 2 and line.startswith("fastmim: error: ") and "Traceback" not in err
    return line


def test_data_demo_and_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    status, out, _ = run(capsys, "data", "demo", str(folder))
    tiles = len(list((folder / "train").glob("*.jpg")))
    assert status == 0 and tiles > 100 and f"{tiles} photographs in train" in out
    (folder / "val" / "broken.jpg").write_bytes(b"not a photograph")
    status, out, _ = run(capsys, "data", "check", str(folder / "val"))
    assert status == 1 and "broken.jpg: " in out and "1 bad file\n" in out
    (folder / "val" / "broken.jpg").unlink()
    status, out, _ = run(capsys, "data", "check", str(folder / "val"))
    assert status == 0 and out.endswith("usable images, 0 bad files\n")


@pytest.mark.parametrize("flag", [["--local_rank=3"], ["--local-rank", "3"]])
@pytest.mark.parametrize("before", [True, False])
def test_the_launchers_local_rank(
    flag: list[str], before: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """deepspeed puts it before the user's arguments; an environment that says more is left alone."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"})
    command = ["config", "show", DEMO]
    status, _, _ = run(capsys, *(flag + command if before else command + flag))
    assert status == 0 and os.environ["LOCAL_RANK"] == "3"
    run(capsys, "--local_rank=5", *command)
    assert os.environ["LOCAL_RANK"] == "3"


def test_only_rank_0_talks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(capsys, "config", "show", DEMO) == (0, "", "")
    status, out, err = run(capsys, "config", "show", DEMO, "optim.lr=-1")
    assert (status, out) == (2, "") and err.startswith("fastmim: rank 1: error: optim.lr=-1")


def test_a_rank_without_a_world_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A variable that was left behind must not silence the only process."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, "config", "show", DEMO)[1] != ""
    status, _, err = run(capsys, "config", "show", DEMO, "optim.lr=-1")
    assert status == 2 and err.startswith("fastmim: error: optim.lr=-1")
    status, _, err = run(capsys, "pretrain", DEMO, "data.path=.", "data.val_path=null")
    assert status == 2 and err.startswith("fastmim: error: RANK=1 but WORLD_SIZE is not set")


class TestFailures:
    """What the run itself may raise."""

    @staticmethod
    def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        def command(options: object) -> int:
            raise error

        monkeypatch.setattr("fastmim.commands.configs.config_keys", command)

    @pytest.mark.parametrize(
        "error, status, line",
        [
            (
                FloatingPointError("non-finite loss at step 3: head"),
                1,
                "error: non-finite loss at step 3: head",
            ),
            (PermissionError(13, "Permission denied", "/out"), 2, "error: /out: permission denied"),
            (OSError("disk"), 2, "error: disk"),
            (LostFolderError(2, "deleted or moved", "output.dir=/out"), 1, "error: output.dir=/out: deleted or moved"),
            (OSError(28, "No space left on device", "/out/File"), 1, "error: /out/File: no space left on device\n"),
            (OSError(27, "File too large", "/out"), 1, "error: /out: file too large; see ulimit -f"),
            (MemoryError(), 1, "error: not enough memory: the system has no more; a smaller model"),
            (TOO_LARGE, 1, "error: not enough memory: 1.13e+06 GB more were asked for; a smaller model"),
            (
                RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 1 GiB"),
                1,
                "error: not enough memory: 20.00 GiB more were asked for; a smaller model",
            ),
            (ValueError("two\nlines"), 2, "error: two lines"),
            (
                ModuleNotFoundError("no", name="fastmim_kernels"),
                2,
                "error: fastmim_kernels is not on the path",
            ),
            (ModuleNotFoundError("no", name="pydantic"), 2, "error: pydantic is not installed; PIP install pydantic"),
            (ModuleNotFoundError("no", name="yaml"), 2, "error: yaml is not installed; PIP install pyyaml"),
            (KeyboardInterrupt(), 130, "interrupted"),
        ],
    )
    def test_status_and_line(
        self,
        error: BaseException,
        status: int,
        line: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.fail_with(monkeypatch, error)
        monkeypatch.setattr("fastmim.wording._pip", lambda: "PIP")
        got, out, err = run(capsys, "config", "keys")
        assert got == status and out == "" and err.startswith(f"fastmim: {line}") and err.count("\n") == 1

    def test_traceback_on_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail_with(monkeypatch, ValueError("here"))
        with pytest.raises(ValueError, match="here"):
            cli.main(["config", "keys", "--traceback"])

    @pytest.mark.parametrize("error", [RuntimeError("a bug"), ModuleNotFoundError("x", name="x")])
    def test_a_bug_keeps_its_traceback(self, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail_with(monkeypatch, error)
        with pytest.raises(type(error)):
            cli.main(["config", "keys"])


def test_warnings_of_the_library_reach_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "config", "show", DEMO)
    logging.getLogger("fastmim").warning("bad image")
    logging.getLogger("fastmim").info("resuming")
    lines = capsys.readouterr().err.splitlines()
    assert [line[8:] for line in lines] == [" fastmim: warning: bad image", " fastmim: resuming"]
    assert all(time.strptime(line[:8], "%H:%M:%S") for line in lines)


def test_a_warning_is_said_once_a_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """By whichever key or part of a run it was found; waiting for data is news each time."""
    log = logging.getLogger("fastmim")
    (tmp_path / "dead.png").symlink_to(tmp_path / "nothing")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for _ in range(2):
        run(capsys, "config", "show", DEMO)
        for field in ("--images", "data.path", "data.path"):
            scan_folder(str(tmp_path), field)
            log.warning("bad image skipped: %s", "a.png")
            log.warning("waiting for data", extra={"repeats": True})
        lines = [line[9:] for line in capsys.readouterr().err.splitlines()]
        assert lines.count("fastmim: warning: bad image skipped: a.png") == 1
        assert lines.count("fastmim: warning: waiting for data") == 3
        dead = [line for line in lines if "leads nowhere" in line]
        assert dead == [f"fastmim: warning: --images={tmp_path}: 1 link leads nowhere: dead.png"]


@pytest.mark.slow
def test_pretrain_end_to_end(tmp_path: Path) -> None:
    """The whole way on a folder of pictures, as a user would run it."""
    for i in range(12):
        Image.effect_noise((120, 120), 40 + i).convert("RGB").save(tmp_path / f"{i}.jpg")
    tiny = ["model.depths=[1, 1, 1, 1]", "model.embed_dim=8", "model.num_heads=[1, 1, 2, 2]"]
    batch = ["train.micro_batch_size=4", "train.steps=2", "train.log_every=1", "data.num_workers=0"]
    out = tmp_path / "out"
    places = [f"data.path={tmp_path}", "data.val_path=null", f"output.dir={out}"]
    result = python_m("pretrain", DEMO, *tiny, *batch, *places)
    assert result.returncode == 0, result.stderr
    assert str(out / "encoder.safetensors") in result.stdout
    assert (out / "encoder.safetensors").is_file() and (out / "metrics.jsonl").is_file()
    assert load_config(out / "config.yaml").train.steps == 2


def test_data_pack_index_and_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source, target = tmp_path / "images", tmp_path / "shards"
    source.mkdir()
    for i in range(3):
        Image.new("RGB", (60, 40), (i, 0, 0)).save(source / f"{i}.png")
    (source / "bad.jpg").write_text("no image")
    status, out, err = run(capsys, "data", "pack", str(source), str(target), "--short-side", "32")
    assert status == 0 and "3 images in 1 shard," in out and "every one read back; 1 bad file\n" in out
    assert f"left out {source / 'bad.jpg'}: not an image" in out and "verify" not in err  # a bar is for terminals
    (target / "shard-000000.idx").unlink()
    status, out, _ = run(capsys, "data", "index", str(target))
    assert status == 0 and "3 images in 1 shard," in out and (target / "shard-000000.idx").is_file()
    status, out, _ = run(capsys, "data", "check", str(target))
    assert status == 0 and "3 usable images, 0 bad files" in out
    assert "--quality 0: must lie in 1" in refused_last_line(
        capsys, "data", "pack", str(source), str(tmp_path / "x"), "--quality", "0"
    )
    assert "no .tar shards" in refused(capsys, "data", "index", str(source))


def test_data_workers_that_cannot_go_on_are_a_failed_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmim.data.worker_error import DataWorkerError

    def fail(*_: object, **_options: object) -> None:
        raise DataWorkerError("2 data workers cannot be started: too many open files")

    monkeypatch.setattr("fastmim.data.check_images", fail)
    status, out, err = run(capsys, "data", "check", str(tmp_path))
    assert (status, out) == (1, "")
    assert err == "fastmim: error: 2 data workers cannot be started: too many open files\n"


def test_keys_of_a_section_or_one_key(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "config", "keys", "optim")
    assert status == 0 and list(yaml.safe_load(out)) == ["optim"] and len(yaml.safe_load(out)["optim"]) > 10
    status, out, _ = run(capsys, "config", "keys", "optim.lr", "train.steps")
    assert list(yaml.safe_load(out)) == ["optim", "train"] and list(yaml.safe_load(out)["optim"]) == ["lr"]
    assert "# peak learning rate" in out
    assert "unknown key; did you mean 'optim'?" in refused(capsys, "config", "keys", "optm")
    assert "optim.lrr: unknown key; did you mean 'lr'?" in refused(capsys, "config", "keys", "optim.lrr")
    assert "optim.lr is a value, not a section" in refused(capsys, "config", "keys", "optim.lr.x")


@pytest.mark.parametrize("word", ["", ".", " ", "optim."])
def test_a_key_without_a_name_says_what_is_expected(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"'{word}': expected a section or section.key, for example optim" in refused(capsys, "config", "keys", word)


@pytest.mark.parametrize("name", ["simmim", "mae", "ibot", "dino", "moco"])
def test_keys_are_words_for_a_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Docstrings have roles and literals, which only Sphinx shows as links and code."""
    status, out, _ = run(capsys, "config", "keys", f"objective.name={name}")
    assert status == 0 and "``" not in out and ":`" not in out
    assert name != "ibot" or "# DINO whose student sees global crops" in out


def test_config_diff(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("train: {steps: 5}\nmodel: {name: swin, depths: [2, 2], num_heads: [3, 6]}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("base: ../one.yaml\ntrain: {steps: 7}\noutput: {dir: there}")
    one, other = str(tmp_path / "one.yaml"), str(tmp_path / "run")
    status, out, err = run(capsys, "config", "diff", one, other)
    assert (status, err) == (1, "") and out == "train.steps: 5 -> 7\noutput.dir: runs/default -> there\n"
    status, out, err = run(capsys, "config", "diff", one, one)
    assert (status, out) == (0, "") and "the same in every key" in err
    assert f"{tmp_path}: no config.yaml in this folder" in refused(capsys, "config", "diff", one, str(tmp_path))
