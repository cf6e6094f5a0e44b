"""The command line: a flag for every field of the configuration."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxserve.config import EngineConfig, from_tables, read_toml, sections, without_none


def parse_args(argv: Sequence[str]) -> EngineConfig:
    """The config of a command line; --help and malformed lines exit, as argparse does.

    Raises: ConfigError listing every value that cannot work.
    """
    parser = make_parser("python -m jaxserve.serve", "Serve a language model over the OpenAI API.")
    return config_of_args(vars(parser.parse_args(argv)))


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser that knows every option of the configuration; the caller may add its own."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110), allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of the options below; the command line wins")
    for section, kind in sections():
        group = parser.add_argument_group(section, (kind.__doc__ or "").strip())
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            _add_flag(group, section, field, hints[field.name])
    return parser


def config_of_args(given: dict[str, Any]) -> EngineConfig:
    """The config of what such a parser has found. Raises: ConfigError."""
    nested = read_toml(given.pop("config")) if "config" in given else {}
    for name, value in given.items():
        section, _, field_name = name.partition(".")
        nested.setdefault(section, {})[field_name] = value
    return from_tables(nested, "command line")


def _add_flag(group: Any, section: str, field: dataclasses.Field[Any], hint: Any) -> None:
    flag, dest = "--" + field.name.replace("_", "-"), f"{section}.{field.name}"
    default = "" if field.default is None or field.default == () else f" (default: {field.default})"
    text = str(field.metadata["help"]) + default
    inner = without_none(hint)
    if inner is bool:
        group.add_argument(flag, dest=dest, action=argparse.BooleanOptionalAction, help=text.replace("%", "%%"))
    elif typing.get_origin(inner) is Literal:
        group.add_argument(flag, dest=dest, choices=typing.get_args(inner), help=text.replace("%", "%%"))
    elif typing.get_origin(inner) is tuple:
        item = typing.get_args(inner)[0]
        metavar = "N,N,..." if item is int else "A,B,..."
        group.add_argument(flag, dest=dest, type=_list_of(item), metavar=metavar, help=text)
    else:
        group.add_argument(flag, dest=dest, type=inner, metavar=inner.__name__.upper(), help=text.replace("%", "%%"))


def _list_of(item: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def comma_separated(value: str) -> tuple[Any, ...]:
        return tuple(item(part) for part in value.split(",") if part)

    return comma_separated
