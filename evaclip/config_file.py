"""From YAML and command-line text to a ``RunConfig``, and back; every problem of a file is reported at once."""

# PyYAML has no types:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from evaclip.config import RunConfig
from evaclip.errors import ConfigError

S = TypeVar("S", bound=BaseModel)


def load(path: str | Path, overrides: Sequence[str] = (), section: type[S] = RunConfig) -> S:
    """Read a YAML file, apply ``section.key=value`` overrides and validate the result.

    Raises:
        ConfigError: The file cannot be read, or the configuration is not valid; the message lists every problem.
    """
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a YAML configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no sections; a configuration is a mapping such as `train: {{steps: 1000}}`")
    sections = cast("dict[str, Any]", tree)
    for item in overrides:
        _override(sections, item)
    return validate(sections, str(path), section)


def from_overrides(overrides: Sequence[str], origin: str, section: type[S]) -> S:
    """A section out of ``key=value`` alone, without a file.

    Raises:
        ConfigError: It is not valid; the message lists every problem.
    """
    tree: dict[str, Any] = {}
    for item in overrides:
        _override(tree, item)
    return validate(tree, origin, section)


def validate(tree: Mapping[str, Any], origin: str, section: type[S] = RunConfig) -> S:
    """Check a parsed configuration, or one of its sections.

    Raises:
        ConfigError: The configuration is not valid; the message lists every problem.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        problems = list(_explain(error, section))
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n  ".join([f"{origin}: {count}", *problems])) from None


def dump(config: BaseModel) -> str:
    """A configuration as YAML, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True)


def flatten(config: BaseModel) -> dict[str, Any]:
    """A configuration as dotted key -> value."""

    def walk(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, inner in cast("dict[str, Any]", value).items():
                yield from walk(inner, f"{prefix}.{key}" if prefix else str(key))
        else:
            yield prefix, value

    return dict(walk(config.model_dump(mode="json"), ""))


# --------------------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """YAML with three surprises less: a repeated key is an error, 1e-3 is a number, and ``off`` is a word."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's own table, without its yes, no, on and off
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        if repeated := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: repeated key {', '.join(repeated)}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """Parse YAML, refusing repeated keys."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader


def _override(tree: dict[str, Any], item: str) -> None:
    dotted, equals, text = item.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"{item!r} is not of the form section.key=value")
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{item!r}: the value is not valid YAML: {error}") from None
    *parents, leaf = dotted.split(".")
    place = tree
    for parent in parents:
        inner = place.get(parent)
        if inner is None:
            inner = place[parent] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{item!r}: {parent} is not a section in the file")
        place = cast("dict[str, Any]", inner)
    place[leaf] = value


# ------------------------------------------------------------------------------------------------------------- errors


def _explain(error: ValidationError, section: type[BaseModel]) -> Iterator[str]:
    known = [
        path
        for option in (*options(), *options(section))
        for path in (option.path, option.path.rpartition(".")[0])
        if path
    ]
    for problem in error.errors(include_url=False):
        where = _path(problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key"
            candidates = {re.sub(r"\bNAME\b", part, path) for path in known for part in _names(where)}
            close = difflib.get_close_matches(where, sorted(candidates), n=1, cutoff=0.75)
            message += f"; did you mean {close[0]}?" if close and close[0] != where else ""
        elif not isinstance(problem["input"], Mapping | BaseModel):
            message += f" (got {problem['input']!r})"
        for line in message.splitlines():
            yield f"{where}: {line}" if where else line


def _path(location: tuple[int | str, ...]) -> str:
    """Where a problem is, without the tags that pydantic puts in for sections of several kinds."""
    parts = [str(part) for part in location]
    kept: list[str] = []
    for number, part in enumerate(parts):
        before = parts[number - 1] if number else ""
        grandparent = parts[number - 2] if number > 1 else ""
        tower = (grandparent, before) == ("model", "image")
        if tower or before in ("optim", "engine") or grandparent in ("sources", "datasets"):
            continue
        kept.append(part)
    return ".".join(kept)


def _names(where: str) -> list[str]:
    parts = where.split(".")
    return [parts[number + 1] for number, part in enumerate(parts[:-1]) if part in ("sources", "datasets")] or ["NAME"]


# --------------------------------------------------------------------------------------------------------------- help


class Option:
    """One line of ``--help``."""

    def __init__(self, path: str, kind: str, default: str, doc: str) -> None:
        self.path, self.kind, self.default, self.doc = path, kind, default, doc


def options(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[Option]:
    """Every option in the order of declaration; ``NAME`` stands for names that the user gives."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        kinds = list(_sections(field.annotation))
        if not kinds:
            yield Option(path, _type(field), _default(field), " ".join((field.description or "").split()))
        named = get_origin(field.annotation) is dict
        found: dict[str, Option] = {}
        for kind in kinds:
            for option in options(kind, f"{path}.NAME." if named else f"{path}."):
                known = found.setdefault(option.path, option)
                if option.kind != known.kind:  # the tag of a section of several kinds
                    known.kind += f"|{option.kind}"
        yield from found.values()


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Sections that a field's type holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (dict, Annotated, Union, UnionType):
        for argument in get_args(annotation):
            yield from _sections(argument)


def _type(field: FieldInfo) -> str:
    def text(annotation: Any) -> str:
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            return text(arguments[0])
        if origin is Literal:
            return "|".join(map(str, arguments))
        if origin in (Union, UnionType):
            return "|".join(text(argument) for argument in arguments)
        if origin is tuple:
            return "[" + ", ".join("..." if a is Ellipsis else text(a) for a in arguments) + "]"
        if origin is dict:
            return "{" + ": ".join(map(text, arguments)) + "}"
        return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))

    return text(field.annotation)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, float):
        return f"{value:.6g}"
    return "null" if value is None else str(list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value)


def help_text(section: type[BaseModel] = RunConfig) -> str:
    """All options with type, default and documentation."""
    return "\n".join(
        f"  {option.path}  <{option.kind}>  default {option.default}\n      {option.doc}" for option in options(section)
    )
