"""`Spec`: the frozen value every setting is, and the one way YAML and `key.sub=value` overrides become one."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from anomaly_vae.errors import ConfigError


class Spec(BaseModel):
    """A frozen setting. Unknown keys are errors; so are values out of range, when the YAML is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, data: Mapping[str, Any], source: str = "the configuration") -> Self:
        """Validate `data`; raises `ConfigError` in one line that names `source` and the first wrong field."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{source}: {_first_problem(error, data)}") from None

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, apply `key.sub=value` overrides, validate."""
        return cls._overridden(override(read_yaml(path), overrides), overrides, str(path))

    def with_overrides(self, overrides: Sequence[str]) -> Self:
        """A copy in which `key.sub=value` texts are applied, validated as a whole."""
        if not overrides:
            return self
        data = override(self.model_dump(mode="json", exclude=self.derived()), overrides)
        return self._overridden(data, overrides, f"override {', '.join(overrides)}")

    def derived(self) -> Any:
        """Fields that were filled in from others, and are so anew when those change; as pydantic's `exclude`."""
        return set()

    @classmethod
    def _overridden(cls, data: Mapping[str, Any], overrides: Sequence[str], source: str) -> Self:
        """Validate; a mistake in an override is blamed on it rather than on the file that it changes."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problem = _first_problem(error, data)
            guilty = next((text for text in overrides if problem.startswith(text.split("=")[0].strip())), None)
            raise ConfigError(f"{f'-o {guilty}' if guilty else source}: {problem}") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-3 is a number, as everybody writing a learning rate expects.

    Aliases are refused: no setting needs them, and a few lines of them can stand for gigabytes.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read", event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as a number, so that what is written is what is read."""


_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)([eE][-+]?\d+)?$")
for _dialect in (_Loader, _Dumper):
    _dialect.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML that `parse_yaml` reads back as it was."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text; raises `ConfigError` with the line of the mistake."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader with one more number format
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"{source}{where}: {problem}; mend the YAML there") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping from a file; an empty file is an empty mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read the configuration {path}: {reason}; give the path of a YAML file") from None
    data = parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the top level must be `key: value` lines, not {type(data).__name__}")
    return data


def override(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `key.sub=value` texts to nested mappings; the value is YAML, so `true`, `3` and `[a, b]` work.

    Another `kind` is another thing: the settings that belonged to the former one go.
    """
    result: dict[str, Any] = dict(data)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip(". "):
            raise ConfigError(f"override {text!r} is not of the form key.sub=value, such as training.epochs=20")
        *parents, leaf = key.strip().split(".")
        node = result
        for parent in parents:
            child = node.get(parent)
            node[parent] = dict(child) if isinstance(child, Mapping) else {}
            node = node[parent]
        parsed = parse_yaml(value, f"override {text!r}")
        if leaf == "kind" and node.get("kind", parsed) != parsed:
            node.clear()
        node[leaf] = parsed
    return result


def _first_problem(error: ValidationError, data: Any) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    field = ".".join(_written(first["loc"], data, first["type"] == "missing")) or "settings"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "no such setting; look for a misspelling"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{field}: {message}{more}"


def _written(place: Sequence[str | int], data: Any, missing: bool) -> Iterator[str]:
    """The place of a mistake as a user writes it: pydantic puts the kind of a union's member between."""
    for i, part in enumerate(place):
        if isinstance(data, Mapping) and part not in data and not (missing and i == len(place) - 1):
            continue
        yield str(part)
        if isinstance(data, Mapping):
            data = data.get(part)
        elif isinstance(data, Sequence) and isinstance(part, int) and part < len(data):
            data = data[part]
