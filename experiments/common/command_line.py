"""How the runners read settings and report bad input.

One flat dataclass a runner; `trl.TrlParser` makes the flags of it; a YAML file (`--config`) gives other defaults; then
every value is checked for type and range, since the parser lets `2.5`, `-3` and `true` of a YAML file through for a
whole number. Anything wrong ends in one sentence on stderr and exit code 2. Nothing heavy is imported here: `--help`
answers at once.
"""

import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from trl import TrlParser

from manako.errors import ManakoError, text_of

Settings = TypeVar("Settings")


class UsageError(ManakoError):
    """The command line or a configuration file cannot be used; the message says what came and what was expected."""


class Help(str):
    """A flag's help text that carries the setting's limits (TrlParser hands all other metadata to argparse)."""

    limits: dict[str, Any]


def setting(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field with its help text and its limits: ge, gt, le, lt, or choices."""
    text = Help(help.replace("%", "%%"))
    text.limits = limits
    return dataclasses.field(default=default, metadata={"help": text})


def parse(kind: type[Settings], arguments: Sequence[str] | None = None, **parser_options: Any) -> Settings:
    """Settings from a YAML file (`--config FILE`) and flags, flags first; checked.

    Raises:
        UsageError: an unknown flag or key, a file that cannot be read, a value of the wrong type or out of range.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(dataclass_types=kind, allow_abbrev=False, **parser_options)
    hints = typing.get_type_hints(kind)
    for action in parser._actions:
        if action.dest in hints:
            action.type = _reader(hints[action.dest])
    parser.add_argument("--config", metavar="FILE", help="YAML file with other defaults; flags go before it")
    file, rest = _take_config(words)
    if file is not None:
        parser.set_defaults_with_config(**read_settings(kind, Path(file)))
    settings = parser.parse_args_into_dataclasses(args=rest, look_for_args_file=False)[0]
    check(kind, dataclasses.asdict(settings), source="")
    return settings


def read_settings(kind: type, file: Path) -> dict[str, Any]:
    """The settings in a YAML file, checked; those it does not name are left out.

    Raises:
        UsageError: the file cannot be read, an unknown key, a value of the wrong type or out of range.
    """
    values = read_yaml(file)
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise UsageError(f"{file} has the unknown key {key!r}{_hint(key, kind)}")
        if isinstance(values[key], str) and _plain(hints[key]) is float:  # YAML 1.1 takes 1e-4 for text
            values[key] = _reader(float)(values[key])
    check(kind, values, source=str(file))
    return values


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UsageError: no such file, no YAML, or no mapping.
    """
    name = repr(str(file))
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text file"
        raise UsageError(f"The configuration {name} cannot be read ({reason}): give a YAML file.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(
            f"The configuration {name} is no YAML{place}: expected lines such as 'num_envs: 64'."
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"The configuration {name} holds no mapping: expected lines such as 'num_envs: 64'.")
    return values


def check(kind: type, values: dict[str, Any], source: str) -> None:
    """Types and limits of the given values.

    Args:
        kind: the dataclass.
        values: some or all of its fields.
        source: the file that they come from; empty for the command line, whose settings are named as flags.

    Raises:
        UsageError: the first value that does not fit.
    """
    from pydantic import Field, TypeAdapter, ValidationError

    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name not in values:
            continue
        value, limits = values[field.name], dict(field.metadata["help"].limits)
        choices = limits.pop("choices", None)
        options = {**limits, "strict": True}
        if _plain(hints[field.name]) is float:
            options["allow_inf_nan"] = False
        try:
            if not (value is None and type(None) in typing.get_args(hints[field.name])):
                annotated: Any = typing.Annotated[_plain(hints[field.name]), Field(**options)]
                TypeAdapter(annotated).validate_python(value)
            fits = choices is None or value is None or value in choices
        except ValidationError:
            fits = False
        if not fits:
            name = f"{field.name} in {source}" if source else f"--{field.name}"
            raise UsageError(f"{name} is {value!r}: expected {_expected(hints[field.name], limits, choices)}.")


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs a runner's main function: bad input is one sentence on stderr and exit code 2, never a traceback.

    Ctrl-C ends it with exit code 130.
    """
    try:
        code = main()
    except ManakoError as error:
        print(f"error: {text_of(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code or 0)


class _Parser(TrlParser):
    """TrlParser whose errors are sentences, with the flag that was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Raised in place of argparse's usage text and exit."""
        message = re.sub(r"^argument (--\w+)[^:]*: ", r"\1: ", message).rstrip(".")
        raise UsageError(f"{message[:1].upper()}{message[1:]}; --help lists the flags.")

    def parse_args_into_dataclasses(self, args: Any = None, **kwargs: Any) -> Any:
        known = {option for action in self._actions for option in action.option_strings}
        for word in args or ():
            name = word.split("=")[0]
            if name.startswith("--") and name not in known:
                near = difflib.get_close_matches(name, sorted(known), 1)
                hint = f", did you mean {near[0]}?" if near else "; --help lists the flags."
                raise UsageError(f"There is no flag {name}{hint}")
        *settings, remaining = super().parse_args_into_dataclasses(args=args, return_remaining_strings=True, **kwargs)
        if remaining:
            raise UsageError(f"{remaining[0]!r} belongs to no flag: expected pairs such as --num_envs 64.")
        return settings


def _take_config(words: list[str]) -> tuple[str | None, list[str]]:
    """The file named by --config FILE or --config=FILE, and the other words."""
    for index, word in enumerate(words):
        if word.startswith("--config="):
            return word.split("=", 1)[1], words[:index] + words[index + 1 :]
        if word == "--config":
            if index + 1 == len(words):
                raise UsageError("--config came without a file: expected --config FILE.")
            return words[index + 1], words[:index] + words[index + 2 :]
    return None, words


def _hint(key: str, kind: Any) -> str:
    near = difflib.get_close_matches(key, [field.name for field in dataclasses.fields(kind)], 1)
    return f", did you mean {near[0]!r}?" if near else ": --help lists the settings."


def _reader(hint: Any) -> Callable[[str], Any]:
    """Text to a value of this type; text that is none stays text, which `check` then refuses by name.

    `none` stands for None where a number may be left out.
    """
    plain, optional = _plain(hint), type(None) in typing.get_args(hint)

    def read(text: str) -> Any:
        if optional and plain is not str and text.lower() == "none":
            return None
        try:
            return (_truth if plain is bool else plain)(text)
        except ValueError:
            return text

    return read


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _plain(hint: Any) -> Any:
    """The type without None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _expected(hint: Any, limits: dict[str, Any], choices: Any) -> str:
    if choices:
        return f"one of {', '.join(map(str, choices))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[_plain(hint)]
    signs = {"ge": "from {} on", "gt": "above {}", "le": "up to {}", "lt": "below {}"}
    return " ".join([words, *(signs[name].format(limit) for name, limit in limits.items())])
