"""Whatever is given as a config: a config, or one short printable line and status 2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fastmim import cli, load_config
from fastmim.config import Config, yaml_text
from fastmim.errors import one_line

pytest.importorskip("hypothesis", reason="random configs come from hypothesis (extra [dev])")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a refusal."""
    status = cli.main(["config", "show", *arguments])
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n")
    assert err[:-1].isprintable() and len(err) < 450
    return err


@pytest.mark.parametrize("override, word", [
    ("optim.lr=!!timestamp x", "timestamp"), ("optim.lr=!!bool x", "'x' is not !!bool"),
    ("optim.lr=!!int 1.5", "not !!int"), ("optim.lr=!!float x", "not !!float"), ("optim.lr=!!binary eA==", "binary"),
    ("optim.lr=!!set {a}", "set"), ("optim.lr=!!python/object/apply:os.getcwd []", "python"),
    ("optim.betas=&a [*a]", "contains itself"), ("efficiency.deepspeed=&a {x: {y: *a}}", "contains itself"),
    ("optim.lr=" + "[" * 3000 + "]" * 3000, "too deeply"), ("optim.lr=1\n---\n2", "another document"),
    ("optim.lr=\ud800", "cannot be printed"), ("data.path=a\0b", "cannot be printed"),
    ("model.name=\x1b[31mred", "cannot be printed"), ("train.steps=" + "9" * 5000, "40 digits"),
    ("optim.lr=1e999", "finite"), ("train.steps=" + "9" * 30, "train.steps"),
    ("train.seed=18446744073709551616", "seed"),
    ("model.window_size=1e30", "at most 1024"), ("model.mlp_ratio=1e308", "at most 64"),
    ("model.img_size=[100000, 100000]", "at most 16384"), ("model.embed_dim=1e12", "embed_dim"),
    ("model.depths=[1000000, 2, 2, 2]", "at most 1000"), ("model.name=" + "x" * 5000, "model.name"),
    ("x" * 5000 + "=1", "xxx"), ("train.micro_batch_size=1e18", "micro_batch_size"),
], ids=lambda value: value[:30] if value.isprintable() else ascii(value)[:30])
def test_what_is_no_config_is_one_line(override: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert word in refused(capsys, "configs/demo.yaml", override)


def test_aliases_that_multiply_are_counted() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ValueError, match="more than 100000 values"):
        yaml_text.parse("\n".join(lines))
    assert yaml_text.parse("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
@pytest.mark.parametrize("way", ["config", "base"])
def test_a_config_is_a_regular_file(kind: str, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("/dev/zero") if kind == "device" else tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "large":
        path.write_text("# " + "x" * 2_000_000)
    given = path
    if way == "base":
        given = tmp_path / "config.yaml"
        given.write_text(f"base: {path}\n")
    line = refused(capsys, str(given))
    assert ("at most 1 MB" if kind == "large" else "regular file") in line and str(path) in line


KEYS = sorted(f"{section}.{key}" for section, field in Config.model_fields.items()
              if hasattr(field.annotation, "model_fields") for key in field.annotation.model_fields)
ODD = st.sampled_from(["!!bool x", "!!null x", "&a [*a]", "{<<: 1}", "? [a] : b", "1e400", "-1e400", ".nan", "1:30",
                       "0x7f", "*a", "<<", "'", '"', "[", "{a: ", "\u2028", "1_000", "1e30", "-1", "[[1]]", "~"])
VALUES = st.one_of(ODD, st.text(max_size=20), st.integers().map(str), st.floats().map(str),
                   st.lists(st.floats(), max_size=4).map(str), st.builds("!!{} {}".format, st.text(max_size=8), ODD))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(key=st.one_of(st.sampled_from(KEYS), st.text(max_size=12)), value=VALUES)
def test_any_override_is_taken_or_refused_in_one_line(key: str, value: str) -> None:
    try:
        cfg: Any = load_config("configs/demo.yaml", [f"{key}={value}"])
    except ValueError as error:
        line = one_line(error)
        assert line.isprintable() and 0 < len(line) <= 400
    else:
        assert yaml_text.parse(yaml_text.dump(cfg.model_dump(mode="json"))) == cfg.model_dump(mode="json")
