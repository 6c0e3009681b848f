"""How the runners read settings and report bad input.

One flat dataclass a runner; `trl.TrlParser` makes the flags of it; a YAML file (`--config`) gives other defaults; then every value
is checked for type and range, since the parser lets `2.5`, `-3` and `true` of a YAML file through for a whole number.
Anything wrong ends in one sentence on stderr and exit code 2. Nothing heavy is imported here: `--help` answers at once.
"""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from trl import TrlParser

Settings = TypeVar("Settings")


class UsageError(ValueError):
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
    parser.add_argument("--config", metavar="FILE", help="YAML file with other defaults; flags go before it")
    file, rest = _take_config(words)
    if file is not None:
        values = read_yaml(Path(file))
        unknown = [key for key in values if key not in {field.name for field in dataclasses.fields(kind)}]  # type: ignore[arg-type]
        if unknown:
            raise UsageError(f"{file} has the unknown key {unknown[0]!r}{_hint(unknown[0], kind)}.")
        check(kind, values, source=file)
        parser.set_defaults_with_config(**values)
    settings = parser.parse_args_into_dataclasses(args=rest)[0]
    check(kind, dataclasses.asdict(settings), source="")
    return settings


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; numbers such as 1e-4, which YAML 1.1 reads as text, are numbers.

    Raises:
        UsageError: no such file, no YAML, or no mapping.
    """
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text file"
        raise UsageError(f"The configuration {str(file)!r} cannot be read ({reason}): give a YAML file.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"The configuration {str(file)!r} is no YAML{place}: expected lines such as 'num_envs: 64'.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"The configuration {str(file)!r} holds no mapping: expected lines such as 'num_envs: 64'.")
    return {key: _number(value) if isinstance(value, str) else value for key, value in values.items()}


def check(kind: type, values: dict[str, Any], source: str) -> None:
    """Types and limits of the given values.

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
        if float in (hints[field.name], *typing.get_args(hints[field.name])):
            options["allow_inf_nan"] = False
        try:
            if not (value is None and type(None) in typing.get_args(hints[field.name])):
                TypeAdapter(typing.Annotated[_plain(hints[field.name]), Field(**options)]).validate_python(value)
            fits = choices is None or value is None or value in choices
        except ValidationError:
            fits = False
        if not fits:
            where = f" in {source}" if source else ""
            raise UsageError(f"{field.name} is {value!r}{where}: expected {_expected(hints[field.name], limits, choices)}.")


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs a runner's main function: bad input is one sentence on stderr and exit code 2, never a traceback."""
    try:
        code = main()
    except ValueError as error:
        if type(error).__name__ not in ("UsageError", "EnvError", "PolicyError", "TrainingError"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.exit(code or 0)


class _Parser(TrlParser):
    """TrlParser whose errors are sentences, with the flag that was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Raised in place of argparse's usage text and exit."""
        raise UsageError(f"{message[:1].upper()}{message[1:].rstrip('.')}; --help lists the flags.")

    def parse_args_into_dataclasses(self, args: Any = None, **kwargs: Any) -> Any:  # noqa: D102
        known = {option for action in self._actions for option in action.option_strings}
        for word in args or ():
            name = word.split("=")[0]
            if name.startswith("--") and name not in known:
                near = difflib.get_close_matches(name, sorted(known), 1)
                hint = f", did you mean {near[0]}?" if near else "; --help lists the flags."
                raise UsageError(f"There is no flag {name}{hint}")
        return super().parse_args_into_dataclasses(args=args, **kwargs)


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
    return f", did you mean {near[0]!r}?" if near else ": --help lists the settings"


def _number(text: str) -> str | float:
    try:
        return float(text) if any(char.isdigit() for char in text) else text
    except ValueError:
        return text


def _plain(hint: Any) -> Any:
    """The type without None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _expected(hint: Any, limits: dict[str, Any], choices: Any) -> str:
    if choices:
        return f"one of {', '.join(map(str, choices))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(_plain(hint), "a mapping")
    signs = {"ge": "from {} on", "gt": "above {}", "le": "up to {}", "lt": "below {}"}
    return " ".join([words, *(signs[name].format(limit) for name, limit in limits.items())])
