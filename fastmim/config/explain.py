"""Every key with its type, default and meaning, as YAML with comments."""

from __future__ import annotations

import textwrap

from fastmim.config import yaml_text
from fastmim.config.fields import Section, describe
from fastmim.config.messages import show
from fastmim.config.sections import Config


def explain(cfg: Config) -> str:
    """`cfg` as YAML that can be loaded again, with a comment above every key."""
    tree = cfg.model_dump(mode="json")
    return "\n".join(_section(name, getattr(cfg, name), values) for name, values in tree.items())


def _section(name: str, section: Section, values: dict[str, object]) -> str:
    lines = [f"# {section.__doc__}", f"{name}:"]
    for key, field in type(section).model_fields.items():
        default = "required" if field.is_required() else f"default {show(field.default)}"
        comment = f"{field.description} ({describe(field.annotation)}; {default})".lstrip()
        lines += textwrap.wrap(comment, 100, initial_indent="  # ", subsequent_indent="  #   ")
        lines.append(textwrap.indent(yaml_text.dump({key: values[key]}).rstrip(), "  "))
    return "\n".join(lines) + "\n"
