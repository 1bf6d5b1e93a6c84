"""Whatever is written into a config or after a command: a config, or one short printable line and status 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", exc_type=ImportError)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastmim.cli import main
from fastmim.config import Config, dump_config, load_config, yaml_text

KEYS = [f"{name}.{key}" for name, section in load_config() for key in type(section).model_fields]
NUMBERS = [
    "1e30", "1e308", "1e309", "-1e308", "1e-320", ".inf", "-.inf", ".nan", "-0", "00", "1_0", "9" * 30, "9" * 400,
    "9" * 5000, "-" + "9" * 5000, "1e" + "9" * 50, str(2**31), str(2**63), str(2**64), str(-(2**64)), "0x10", "1:30",
]  # fmt: skip
TAGGED = [
    f"!!{tag} {value}"
    for tag in (
        "timestamp", "bool", "int", "float", "null", "binary", "set", "omap", "pairs", "str", "seq", "map", "merge",
        "python/object:os.system", "python/name:os.system", "python/tuple", "unheard",
    )
    for value in ("x", "1", "2020-01-01", "[a]", "{a: 1}", "''")
]  # fmt: skip
STRUCTURES = [
    "&a [*a]", "&a {b: *a}", "&a [&b [*a, *b]]", "{? &a [*a] : 1}", "*a", "&a 1", "[" * 1200, "{a: " * 1200,
    "[" * 300 + "]" * 300, "1\n---\n2", "--- 1\n--- 2\n...", "%YAML 9.9\n--- 1", "%TAG ! x\n--- !y 1", "? [a]\n: b",
    "{[a]: b}", "{{a: b}: c}", "<<: 1", "{<<: [1]}", "{<<: *a}", "|\n a\n b", "a: b: c", "- 1\n- 2", "!", "!<x> 1", "@",
    "`", '"\\ud800"', '"\\udfff\\ud800"', "\ud800", "\udcff", '"\\0"', "\x1b[31mred", '"\\e[2J"', "\x00", "\u202e",
    "\u2028", "x" * 9000, "[" + "1, " * 4000 + "1]", "{" + "a: 1," * 3000 + "}", '"' + "\\n" * 4000 + '"', "null",
    "true", "[]", "{}",
    "[&a [1,1,1,1,1,1,1,1,1], &b [*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b], &d [*c,*c,*c,*c,*c,*c,*c], *d]",
]  # fmt: skip
VALUES = NUMBERS + TAGGED + STRUCTURES + [f"[{number}, {number}]" for number in NUMBERS]


def is_one_short_printable_line(text: str) -> bool:
    return len(text) <= 1400 and text.isprintable() and text != ""


def checked(overrides: list[str], path: Path | None = None) -> str | None:
    """What the refusal says; None for a config that can be written, and read again as the same."""
    try:
        cfg = load_config(path, overrides)
    except ValueError as error:
        assert is_one_short_printable_line(str(error)), str(error)[:2000]
        return str(error)
    assert isinstance(cfg, Config)
    assert yaml_text.parse(dump_config(cfg).encode().decode()) == cfg.model_dump(mode="json")
    return None


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_each_value_in_every_key(value: str) -> None:
    for key in ("model", "objective", "unknown.key", "efficiency.deepspeed.a", "base", *KEYS[number_of(value) :: 12]):
        checked([f"{key}={value}"])


def number_of(value: str) -> int:
    return VALUES.index(value) % 12


def test_each_value_in_a_file(tmp_path: Path) -> None:
    for value in VALUES:
        for text in (value, f"train: {value}", f"base: {value}", f"model: {{img_size: {value}}}", f"{value}: 1"):
            (tmp_path / "a.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
            checked([], tmp_path / "a.yaml")


ANY = st.one_of(
    st.sampled_from(VALUES),
    st.text(max_size=30),
    st.integers().map(str),
    st.floats().map(str),
    st.lists(st.one_of(st.sampled_from(VALUES), st.integers().map(str)), max_size=4).map(lambda v: f"[{', '.join(v)}]"),
    st.text(alphabet="&*!|>%@{}[],:?-#'\"\\ \n\tab1.e<~\ud800\udcff\x00\x1b", max_size=25),
)


@settings(max_examples=400, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.one_of(st.sampled_from(KEYS), st.text(max_size=12)), ANY), min_size=1, max_size=3))
def test_any_overrides(pairs: list[tuple[str, str]]) -> None:
    checked([f"{key}={value}" for key, value in pairs])


IN_A_SECTION = st.builds(lambda key, value: f"{key.replace('.', ': {')}: {value}}}", st.sampled_from(KEYS), ANY)


@settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(text=st.one_of(ANY, IN_A_SECTION))
def test_any_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    checked([], path)


ABSURD = [
    ("model.window_size=1e30", "no map has as many tokens"),
    ("model.window_size=[4, 1000000]", "no map has as many tokens"),
    ("model.mlp_ratio=1e308", "single precision holds no larger"),
    ("model.mlp_ratio=1e6", "the MLP would be larger"),
    ("model.mlp_ratio=1e-9", "leaves the MLP no channel"),
    ("model.img_size=31680", "no GPU holds"),
    ("model.img_size=[1000000000, 32]", "no GPU holds"),
    ("model.in_chans=1000000000", "no known model is as wide"),
    ("model.embed_dim=1e12", "no run counts further"),
    ("model.depths=[2, 2, 1000000, 2]", "no known model is as deep"),
    (f"model.depths={[1] * 40}", "more values than can be meant"),
    ("train.seed=18446744073709551616", "64 bits"),
    ("train.steps=1e18", "no run counts further"),
    ("train.micro_batch_size=1000000000", "no device holds"),
    ("data.num_workers=1000000", "more than a machine has cores"),
    ("efficiency.threads=1000000", "more than a machine has cores"),
    ("optim.lr=1e300", "single precision"),
    ("optim.warmup_epochs=1e30", "no run is as long"),
    ("objective.norm_target=1000000001", "wider than any image"),
    ("output.pictures=1000000000", "one picture shows them all"),
]


@pytest.mark.parametrize(("override", "reason"), ABSURD, ids=[override[:40] for override, _ in ABSURD])
def test_absurd_sizes_are_bounded_with_a_reason(override: str, reason: str) -> None:
    said = checked([override])
    assert said is not None and reason in said and said.startswith(override.partition("=")[0])


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.steps=!!timestamp 2020-01-01", "the tag '!!timestamp' has no use here"),
        ("train.steps=!!bool x", "'x' is no bool, as its tag says"),
        ("model.depths=&a [*a]", "nested too deeply, or hold themselves"),
        ("train.steps=1\n---\n2", "another document"),
        ('data.path="\\ud800"', "lone surrogate"),
        (f"train.steps={'9' * 5000}", "a number of 5000 digits"),
        (f"optim.lr={'9' * 390}", "optim.lr=an integer of 1296 bits"),
    ],
    ids=range(7),
)
def test_the_reason_is_said(override: str, reason: str) -> None:
    assert reason in str(checked([override]))


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "/dev/stdin", "folder", "nul", "long", "loop", "huge"])
@pytest.mark.parametrize("where", ["file", "base"])
def test_only_regular_files_are_configs(tmp_path: Path, kind: str, where: str) -> None:
    path = tmp_path / "x.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "huge":
        path.write_text("#" * 2_000_000)
    name = {"nul": "a\0b", "long": "x" * 5000}.get(kind, kind if kind.startswith("/") else str(path))
    if where == "base":
        (tmp_path / "top.yaml").write_text(f'base: "{name}"'.replace("\0", "\\0"))
    # In a process of its own: one that waits for a pipe cannot be ended from within.
    code = "import sys; from fastmim.config import load_config; load_config(eval(sys.argv[1]))"
    given = ascii(str(tmp_path / "top.yaml") if where == "base" else name)
    pipes = dict(stdin=subprocess.PIPE, capture_output=True, text=True, timeout=100, check=False)
    ended = subprocess.run([sys.executable, "-c", code, given], **pipes)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("ValueError: ") and is_one_short_printable_line(last), last


def test_bases_of_bases(tmp_path: Path) -> None:
    """Each file twice the base of the next: every one is read once. And a chain that has no end of its own."""
    (tmp_path / "0.yaml").write_text("train: {steps: 7}")
    for number in range(1, 19):
        (tmp_path / f"{number}.yaml").write_text(f"base: [{number - 1}.yaml, {number - 1}.yaml, {number - 1}.yaml]")
    assert load_config(tmp_path / "18.yaml").train.steps == 7
    for number in range(19, 40):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number - 1}.yaml")
    assert "more than 20 files" in str(checked([], tmp_path / "39.yaml"))


COMMANDS = [
    ["config", "show", "{file}", "train.steps=\x1b[31mred"],
    ["config", "show", "{file}", "x" * 10_000],
    ["config", "show", "{file}", "--" + "y" * 10_000 + "=1"],
    ["config", "show", "{file}\x1b[2J" + "z" * 300],
    ["config", "show", "{file}", "output.dir=\udcff"],
    ["config", "show", "{file}", "train.steps=1\n---\n2"],
    ["pretrain", "{file}", "data.path=" + "a" * 5000],
    ["convert", "a" * 5000, "b.safetensors"],
]


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_a_command_says_one_short_printable_line(tmp_path: Path, number: int, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "a.yaml").write_text(f"output: {{dir: {tmp_path / 'run'}}}")
    assert main([word.replace("{file}", str(tmp_path / "a.yaml")) for word in COMMANDS[number]]) == 2
    said = capfd.readouterr().err.removesuffix("\n").splitlines()[-1]
    assert is_one_short_printable_line(said) and said.startswith("fastmim: error: ")
