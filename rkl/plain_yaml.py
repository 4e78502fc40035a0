"""The YAML that a configuration may be written in."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml


class PlainLoader(yaml.SafeLoader):
    """Loads plain values only. A few lines of aliases of aliases could grow to gigabytes when printed or merged; and of
    a key that is written twice PyYAML would drop the first value without a word."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias, which a configuration may not use")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, times in keys.items() if times > 1]:
            raise yaml.YAMLError(f"the key {twice[0]!r} twice; remove one of the two")
        return node
