"""Parses YAML from outside within limits. Apart from JSON: its library takes long to import."""

from __future__ import annotations

from typing import Any

import yaml

from internvl_ds.files.reading import DEPTH, INT_BITS, YAML_BYTES, YAML_VALUES, Unreadable


def parse_yaml(text: str) -> Any:
    """Parses YAML; aliases count as often as they are used.

    Raises:
        Unreadable: where it is no YAML, or too long, too deep or too large.
    """
    if len(text) > YAML_BYTES:
        raise Unreadable(f'has {len(text)} characters, and YAML is read up to {YAML_BYTES}')
    try:
        return yaml.load(text, _YamlLoader)
    # Beside its own errors the library raises those of int(), date() and others for odd values.
    except Exception as error:
        raise Unreadable(' '.join(str(error).split()) or type(error).__name__) from error


class _YamlLoader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth, self._count = 0, 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            node: Any = super().compose_node(parent, index)
            if node not in self._sizes:
                raise yaml.YAMLError('an alias stands inside of what it names')
            self._count += self._sizes[node]
            return node
        self._depth, self._count, before = self._depth + 1, self._count + 1, self._count
        if self._depth > DEPTH or self._count > YAML_VALUES:
            raise yaml.YAMLError(
                f'more than {DEPTH} levels, or than {YAML_VALUES} values with aliases followed'
            )
        node = super().compose_node(parent, index)
        self._depth, self._sizes[node] = self._depth - 1, self._count - before
        return node

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > INT_BITS:
            raise yaml.YAMLError(f'an integer of {len(node.value)} characters')
        return int(super().construct_yaml_int(node))


_YamlLoader.add_constructor('tag:yaml.org,2002:int', _YamlLoader.construct_yaml_int)
