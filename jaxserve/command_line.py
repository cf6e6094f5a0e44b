"""The command line: a flag for every field of the configuration, under vLLM's name too where it has one, and vLLM's other options."""

from __future__ import annotations

import argparse
import dataclasses
import decimal
import json
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxserve.config import EngineConfig, check_foreign, from_tables, read_toml, sections, without_none
from jaxserve.vllm_options import FOREIGN, RENAMED, SHORT

_FOREIGN = "vllm"
_SIZES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kmgtKMGT])")


def parse_args(argv: Sequence[str]) -> EngineConfig:
    """The config of a command line; --help and malformed lines exit, as argparse does.

    Raises: ConfigError listing every value that cannot work.
    """
    parser = make_parser("python -m jaxserve.serve", "Serve a language model over the OpenAI API.")
    return config_of_args(vars(parser.parse_args(argv)))


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser that knows every option of the configuration; the caller may add its own."""
    parser = argparse.ArgumentParser(
        prog=prog, usage="%(prog)s [MODEL] [OPTION ...]", description=description, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110), allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("model.model", metavar="MODEL", nargs="?", help="the same as --model MODEL")
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of the options below; the command line wins")
    for section, kind in sections():
        group = parser.add_argument_group(section, (kind.__doc__ or "").strip())
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            _add_flag(group, section, field, hints[field.name])
    group = parser.add_argument_group("vLLM", "Options of vLLM that change nothing here, or are refused: docs/options.md.")
    for name, option in FOREIGN.items():
        flag, dest = "--" + name.replace("_", "-"), f"{_FOREIGN}.{name}"
        if option.is_flag:
            group.add_argument(flag, dest=dest, action=argparse.BooleanOptionalAction, help=argparse.SUPPRESS)
        else:
            short = [SHORT[name]] if name in SHORT else []
            group.add_argument(flag, *short, dest=dest, help=argparse.SUPPRESS)
    return parser


def config_of_args(given: dict[str, Any]) -> EngineConfig:
    """The config of what such a parser has found. Raises: ConfigError."""
    nested = read_toml(given.pop("config")) if "config" in given else {}
    check_foreign({name: given.pop(f"{_FOREIGN}.{name}") for name in FOREIGN if f"{_FOREIGN}.{name}" in given})
    for name, value in given.items():
        section, _, field_name = name.partition(".")
        nested.setdefault(section, {})[field_name] = value
    return from_tables(nested, "command line")


def _add_flag(group: Any, section: str, field: dataclasses.Field[Any], hint: Any) -> None:
    names = [field.name, *(foreign for foreign, own in RENAMED.items() if own == field.name)]
    flags = ["--" + name.replace("_", "-") for name in names] + [SHORT[name] for name in names if name in SHORT]
    default = "" if field.default is None or field.default == () else f" (default: {field.default})"
    text = (str(field.metadata["help"]) + default).replace("%", "%%")
    options: dict[str, Any] = {"dest": f"{section}.{field.name}", "help": text}
    inner = without_none(hint)
    if inner is bool:
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, **options)
    elif typing.get_origin(inner) is Literal:
        group.add_argument(*flags, choices=typing.get_args(inner), **options)
    elif typing.get_origin(inner) is tuple:
        item = typing.get_args(inner)[0]
        group.add_argument(
            *flags, nargs="+", action=_Listed, type=_list_of(item), metavar="N,N,..." if item is int else "A,B,...", **options
        )
    else:
        group.add_argument(*flags, type=_count if inner is int else inner, metavar=inner.__name__.upper(), **options)


class _Listed(argparse.Action):
    """One tuple of the values of a list option, which are comma-separated, or apart as in vLLM; given again, it counts anew."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(item for value in values for item in value))


def _count(text: str) -> int:
    """An integer, also as vLLM takes it: 8k is 8000, 8K is 8192."""
    matched = _COUNT.fullmatch(text)
    try:
        return int(text) if matched is None else int(decimal.Decimal(matched[1]) * _SIZES[matched[2]])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None


def _list_of(item: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def comma_separated(value: str) -> tuple[Any, ...]:
        parts = json.loads(value) if value.startswith("[") else [part for part in value.split(",") if part]
        return tuple(item(part) for part in parts)

    return comma_separated
