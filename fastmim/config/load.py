"""Read a config: ``base:`` files, then the file, then ``key=value`` overrides; later wins."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from fastmim.config import yaml_text
from fastmim.config.fields import describe
from fastmim.config.former import FORMER, translated
from fastmim.config.messages import Sections, fields_at, names_at, nearest, one_line, show, unknown_key
from fastmim.config.objective import DEFAULT, objective_section
from fastmim.config.sections import Config
from fastmim.files import write_text

Tree = dict[str, Any]
_LOG = logging.getLogger("fastmim")
_LARGEST = 1_000_000

# Two ways to say the same thing: a layer that uses one replaces what a lower layer said with the other.
_ALTERNATIVES = (
    ("data", "val_path", "val_fraction"),
    ("train", "steps", "epochs"),
    ("optim", "warmup_steps", "warmup_epochs"),
    ("optim", "milestone_steps", "milestones"),
    ("optim", "decay_steps", "decay_epochs"),
)


def load_config(path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read and check a config.

    Args:
        path: YAML file, or None for the defaults. Its top-level key ``base`` names one file or a list of
            files, relative to itself, that it builds on: sections merge deeply, lists and values replace. Where
            other images replace a layer's, its ``data.val_path`` goes with them, with a warning.
        overrides: ``"section.key=value"``, the value in YAML, applied in order on top.

    Raises:
        ValueError: one line that names the field, its value and what to do: an unknown key, a wrong type,
            values that do not fit together, a file that is missing, is not YAML or includes itself.
    """
    return config_of(read_tree(path, overrides))


def read_tree(path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Tree:
    """What a file, its bases and the overrides say: sections of keys and values, without any default.

    Raises:
        ValueError: as :func:`load_config`, but for values that are wrong.
    """
    tree = _read(Path(path), ()) if path is not None else {}
    return _merge(tree, _parse_overrides(overrides, _sections(tree, overrides)))


def merge_trees(lower: Tree, upper: Tree) -> Tree:
    """The tree `upper` over the tree `lower`, as an override stands over a file."""
    return _merge(lower, upper)


def config_of(tree: Tree) -> Config:
    """The checked config of a tree of :func:`read_tree`.

    Raises:
        ValueError: one line that names the field, its value and what to do.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(one_line(error, _sections(tree, ()))) from None


def _sections(tree: Tree, overrides: Sequence[str]) -> Sections:
    """The sections there are, that of the objective being the one which the file, or else an override, names."""
    layers = [tree.get("objective")]
    for override in overrides:
        key, _, text = (part.strip() for part in override.partition("="))
        with suppress(ValueError):  # what is no YAML is refused where the override is read
            if key == "objective.name":
                layers.append({"name": text if _is_plain(text) else yaml_text.parse(text)})
            elif key == "objective":
                layers.append(yaml_text.parse(text))
    given = [layer["name"] for layer in layers if isinstance(layer, dict) and layer.get("name") is not None]
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    try:
        return {**sections, "objective": objective_section(given[-1] if given else DEFAULT)}  # type: ignore[dict-item]
    except PydanticCustomError as error:
        raise ValueError(error.message()) from None


def dump_config(cfg: Config) -> str:
    """`cfg` as YAML with every key, defaults included."""
    return yaml_text.dump(cfg.model_dump(mode="json"))


def save_config(cfg: Config, path: str | os.PathLike[str]) -> None:
    """Write `cfg` with every key; ``load_config(path)`` gives an equal config."""
    write_text(Path(path), dump_config(cfg))


def _read(path: Path, including: tuple[Path, ...]) -> Tree:
    """The tree of one file on top of its bases. `including` is the chain of files that led here."""
    here = path.resolve()
    if here in including:
        chain = " -> ".join(p.name for p in (*including[including.index(here) :], here))
        raise ValueError(f"{path}: the file includes itself through base: {chain}; remove one of them")
    tree = translated(_parse_file(path, including[-1] if including else None))
    bases = tree.pop("base", None) or []
    merged: Tree = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise ValueError(f"{path}: base={base}: expected a file name or a list of them")
        merged = _merge(merged, _read(path.parent / base, (*including, here)))
    return _merge(merged, tree)


def _parse_file(path: Path, included_by: Path | None) -> Tree:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError("not a regular file; a config is read from one")
        tree = yaml_text.parse(_text(path))
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else (error.strerror or str(error)).lower()
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        source = f" (base of {included_by})" if included_by else ""
        raise ValueError(f"{path}: {reason}{source}{nearest(path.name, siblings)}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8; expected a YAML config") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ValueError(f"{path}: expected sections ({', '.join(Config.model_fields)}), each with keys and values")
    return tree


def _text(path: Path) -> str:
    # The system's own files, as /proc/kmsg, are regular, of length 0, and may be endless or let their reader wait.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        text = file.read(_LARGEST + 1)
    if text is None or len(text) > _LARGEST:
        raise ValueError(f"nothing there, or more than a config has: at most {_LARGEST / 1e6:.0f} MB")
    return text.decode("utf-8")


def _merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> Tree:
    """The layer `upper` over the layers `lower`, both left as they are."""
    merged = dict(lower)
    for section, first, second in _ALTERNATIVES:
        given, below = upper.get(section), merged.get(section)
        if isinstance(given, dict) and isinstance(below, dict):
            for chosen, other in ((first, second), (second, first)):
                if given.get(chosen) is not None and other not in given:
                    below = {key: value for key, value in below.items() if key != other}
            merged[section] = below
    return _overlay(_without_their_held_out(merged, upper), upper)


def _without_their_held_out(lower: Tree, upper: Mapping[str, Any]) -> Tree:
    """A layer whose `data` names images and held-out ones: the second go where a layer above names other images.

    They were kept apart from the images that they stood beside, and may be among the new ones, or of another kind.
    """
    below, given = lower.get("data"), upper.get("data")
    if not isinstance(below, dict) or not isinstance(given, dict) or {"val_path", "val_fraction"} & set(given):
        return lower
    for key in ("path", "file_list"):
        old, new = below.get(key), given.get(key)
        if old is not None and new is not None and new != old and below.get("val_path") is not None:
            kept = f"data.val_path={show(below['val_path'])}"
            _LOG.warning(
                "%s is left out: it belongs to data.%s=%s, and data.%s=%s is given; give %s too to keep it, or "
                "data.val_fraction=0.1 to hold out a tenth of the images", kept, key, show(old), key, show(new), kept
            )  # fmt: skip
            return {**lower, "data": {name: value for name, value in below.items() if name != "val_path"}}
    return lower


def _overlay(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> Tree:
    merged = dict(lower)
    for key, value in upper.items():
        old = merged.get(key)
        # A section that is null says nothing: all its keys are commented out.
        if isinstance(old, dict) and (value is None or isinstance(value, dict)):
            merged[key] = _overlay(old, value or {})
        else:
            merged[key] = value
    return merged


def _parse_overrides(overrides: Sequence[str], sections: Sections) -> Tree:
    tree: Tree = {}
    for override in overrides:
        if not override.replace("\n", " ").replace("\t", " ").isprintable():
            raise ValueError(f"override {show(ascii(override))}: holds a character that cannot be printed")
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ValueError(f"override '{show(override)}': expected section.key=value, for example train.steps=20")
        _check_key(override, parts, sections)
        value = _parse_value(override, parts, text, sections)
        for part in reversed(parts):
            value = {part: value}
        tree = _overlay(tree, value)
    return translated(tree)


def _check_key(override: str, parts: list[str], sections: Sections) -> None:
    """The key exists, one level deep (but below a field that holds a tree); checked before the value is read."""
    if tuple(parts) in FORMER:
        return
    if parts[0] == "base":
        raise ValueError(f"override '{show(override)}': base is a key of files only; name another file instead")
    for depth, part in enumerate(parts, start=1):
        location = tuple(parts[:depth])
        if depth > 2 and describe(fields_at(sections, parts)[parts[1]].annotation) == "section":
            return
        if depth > 2:
            raise ValueError(f"override '{show(override)}': {'.'.join(parts[:2])} is a value, not a section")
        if part not in names_at(sections, location):
            raise ValueError(unknown_key(sections, location))


def _is_plain(text: str) -> bool:
    """Whether a text field takes it as it is: neither quoted, nor null, nor nothing."""
    return bool(text) and text[0] not in "'\"" and text != "null"


def _parse_value(override: str, parts: list[str], text: str, sections: Sections) -> Any:
    """YAML; but what a text field gets is taken as it is, unless it is quoted or null."""
    text = text.strip()
    field = fields_at(sections, parts).get(parts[1]) if len(parts) == 2 else None
    kind = "" if field is None else describe(field.annotation)
    is_list = kind.startswith("text or list") and text.startswith("[") and text.endswith("]")
    if kind.startswith("text") and _is_plain(text) and not is_list:
        return text
    try:
        value = yaml_text.parse(text)
    except ValueError as error:
        raise ValueError(f"override '{show(override)}': the value is not YAML: {error}") from None
    if len(parts) == 1 and not (value is None or isinstance(value, dict)):
        raise ValueError(f"override '{show(override)}': {parts[0]} is a section; expected {parts[0]}.key=value")
    return value
