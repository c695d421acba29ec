"""All keys of the yacs tree with their effect, from the comments in `internvl_ds.config.defaults`.

A key's words stand at the end of its line, or in the comment lines right above it.
"""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from dataclasses import dataclass

from yacs.config import CfgNode

from internvl_ds.config import defaults
from internvl_ds.config.tree import get_option

_NEW = '(new)'
_HEAD = """# Configuration keys

All keys of the yacs tree: names and defaults are those of the original's `config.py`, so that its
YAML files merge without an edit. Keys with a + are this package's own. An unknown key, a value of
another type, and a value that means nothing are errors. This file is what `internvl-ds config keys`
prints, from the comments in `internvl_ds/config/defaults.py`.
"""


@dataclass(frozen=True)
class Key:
    """A key of the tree.

    Attributes:
        name: dotted.
        default: as Python writes it; '' of a section.
        effect: what it does, in a line; empty where nothing says so.
        new: whether the original lacks it.
    """

    name: str
    default: str
    effect: str
    new: bool


def documented_keys() -> list[Key]:
    """The keys in the order of the tree's file; a section that takes any keys counts as one."""
    source = inspect.getsource(defaults)
    comments = {
        token.start[0]: (token.string.lstrip('# ').rstrip(), token.line.lstrip().startswith('#'))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    keys, new_sections = [], set()
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.Assign):
            continue
        name = ast.unparse(statement.targets[0]).removeprefix('_C.')
        if name == 'DEFAULTS':
            continue
        effect = _words(comments, statement)
        section = name.partition('.')[0]
        if isinstance(node := get_option(defaults.DEFAULTS, name), CfgNode):
            if effect.startswith(_NEW):
                new_sections.add(section)
            if not (node.is_new_allowed() and effect):
                continue
        new = section in new_sections or effect.startswith(_NEW)
        default = '' if isinstance(node, CfgNode) else repr(node)
        keys.append(Key(name, default, effect.removeprefix(_NEW).strip(), new))
    return keys


def as_markdown() -> str:
    """A table for each section."""
    tables: dict[str, list[str]] = {}
    for key in documented_keys():
        section = key.name.rpartition('.')[0] or 'Without a section'
        mark = ' +' if key.new else ''
        effect = key.effect.replace('|', '\\|')
        row = f'| `{key.name}`{mark} | {f"`{key.default}`" if key.default else ""} | {effect} |'
        tables.setdefault(section, []).append(row)
    parts = [
        '\n'.join([f'## {section}', '', '| key | default | effect |', '| --- | --- | --- |', *rows])
        for section, rows in tables.items()
    ]
    return '\n'.join([_HEAD, '\n\n'.join(parts), ''])


def _words(comments: dict[int, tuple[str, bool]], statement: ast.stmt) -> str:
    """The comment lines right above a statement, and the comment at its end."""
    above: list[str] = []
    line = statement.lineno - 1
    while comments.get(line, ('', False))[1]:
        above.insert(0, comments[line][0])
        line -= 1
    end = comments.get(statement.end_lineno or 0, ('', True))
    return ' '.join([*above, *([] if end[1] else [end[0]])])
