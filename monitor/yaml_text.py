"""YAML as people write it here: read strictly, and written so that it reads back the same."""

from __future__ import annotations

from typing import Any

import yaml


def read_mapping(text: str, source: str, fault: type[ValueError]) -> dict[str, Any]:
    """Parse a mapping of keys.

    Parameters
    ----------
    text : str
    source : str
        What it is called in messages.
    fault : type
        What is raised for anything else: no YAML, a key given twice, no mapping.
    """
    try:
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise fault(f"{source}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise fault(f"{source}: expected a mapping of keys, got {type(content).__name__}")
    return content


def refuse_newer(content: object, newest: int) -> None:
    """Raise a ValueError where ``schema_version`` is above ``newest``.

    To be called before anything else is looked at: the keys of a newer schema must not be blamed
    one by one.
    """
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > newest:
        raise ValueError(
            f"schema_version: {version} is newer than {newest}, the newest that this midstream "
            "reads; upgrade midstream"
        )


def write_mapping(content: dict[str, Any]) -> str:
    """YAML in the order of the keys."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML takes for a line break, which would come back as a space."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(breaks in data for breaks in "\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would quietly take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value}: given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)
