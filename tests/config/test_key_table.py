"""Every key of the yacs tree says what it does, and does it."""

import ast

import pytest
from yacs.config import CfgNode

from internvl_ds.config.counts import require_linear_drop_path
from internvl_ds.config.key_table import as_markdown, documented_keys
from internvl_ds.config.tree import default_config
from internvl_ds.errors import ConfigError
from internvl_ds.tools.cli import main
from tests.config.test_tree import flatten
from tests.harness.ranks import ROOT

LEAVES = {
    name for name, value in flatten(default_config()).items() if not isinstance(value, CfgNode)
}
# Not read, as their words say: the launcher's environment decides; the attention is torch's.
_UNREAD = {'LOCAL_RANK', 'MODEL.INTERN_VIT_6B.USE_FLASH_ATTN'}


def test_the_table_in_the_documents_is_that_of_the_tree(capsys):
    assert main(['config', 'keys']) == 0
    printed = capsys.readouterr().out
    assert printed == as_markdown()
    told = 'run: internvl-ds config keys > docs/configuration.md'
    assert (ROOT / 'docs' / 'configuration.md').read_text() == printed, told


def test_every_key_has_its_effect_in_words():
    keys = documented_keys()
    assert {key.name for key in keys if key.default} == LEAVES
    assert [key.name for key in keys if not key.effect] == []
    by_name = {key.name: key for key in keys}
    assert by_name['COMM.TIMEOUT'].new
    assert by_name['AUG.SCALE'].new
    assert not by_name['AUG.MEAN'].new
    assert by_name['SEED'].default == '0'


def test_every_key_is_read():
    attributes, texts = set(), set()
    for path in (ROOT / 'internvl_ds').rglob('*.py'):
        if path.name == 'defaults.py':
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                attributes.add(node.attr)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    unread = [
        name
        for name in LEAVES
        if name.rpartition('.')[2] not in attributes | texts and name not in texts
    ]
    assert [name for name in unread if name not in _UNREAD] == []


def test_a_drop_path_that_no_model_has_is_refused():
    config = default_config()
    require_linear_drop_path(config)
    config.MODEL.DROP_PATH_TYPE = 'uniform'
    with pytest.raises(ConfigError, match="MODEL.DROP_PATH_TYPE is 'uniform'.*MODEL.FACTORY"):
        require_linear_drop_path(config)
    config.MODEL.FACTORY = 'mine:model'
    require_linear_drop_path(config)
