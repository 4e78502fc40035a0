"""The YAML that a configuration may be written in."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import ComposerError


class PlainLoader(yaml.SafeLoader):
    """Loads plain values only. A few lines of aliases of aliases could grow to gigabytes when printed or merged; and of
    a key that is written twice PyYAML would drop the first value without a word."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise ComposerError(problem="an alias, which a configuration may not use", problem_mark=alias.start_mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                again = f"the key {key.value!r} twice; remove one of the two"
                raise ComposerError(problem=again, problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def place(error: Exception) -> str:
    """An error of the loader with its place in the file; empty for an error that has no place."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return ""
    said = ", ".join(part for part in (error.context, error.problem) if part)
    return f"{said} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
