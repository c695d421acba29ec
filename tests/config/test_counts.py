"""Settings that count: what means nothing is refused by name."""

import pytest
from yacs.config import CfgNode

from internvl_ds.config.counts import require_counts
from internvl_ds.config.tree import default_config
from internvl_ds.errors import ConfigError


@pytest.mark.parametrize(
    ('key', 'value', 'least'),
    [
        ('EVAL_FREQ', -1, 0), ('SAVE_FREQ', None, 0), ('PRINT_FREQ', -10, 0), ('SEED', -1, None),
        ('DATA.BATCH_SIZE', 0, 1), ('DATA.IMG_SIZE', 0, 1), ('MODEL.NUM_CLASSES', -1, 0),
        ('TRAIN.SAVE_MINUTES', float('nan'), 0),
        ('TRAIN.SAVE_STEPS', -1, 0), ('CHECKPOINT.KEEP_EVERY', -1, 0),
        ('CHECKPOINT.IO_TIMEOUT', 0, 1), ('SAVE_CKPT_NUM', -1, None),
    ],
)  # fmt: skip
def test_a_count_that_means_nothing_is_refused(key, value, least):
    config = default_config()
    require_counts(config)
    section, _, name = key.rpartition('.')
    node = config[section] if section else config
    node[name] = value
    if least is None:
        require_counts(config)
        return
    with pytest.raises(ConfigError, match=rf'^{key} is {value}; it takes .* at least {least}$'):
        require_counts(config)
    node[name] = least
    require_counts(config)


def test_of_another_scripts_tree_only_what_the_adapters_read_is_looked_at():
    theirs = CfgNode({'EVAL_FREQ': 'never', 'SAVE_CKPT_NUM': 3, 'CHECKPOINT': CfgNode()})
    require_counts(theirs, ('SAVE_CKPT_NUM', 'CHECKPOINT'))
    theirs.SAVE_CKPT_NUM = None
    with pytest.raises(ConfigError, match='SAVE_CKPT_NUM is None; it takes a number$'):
        require_counts(theirs, ('SAVE_CKPT_NUM', 'CHECKPOINT'))


def test_no_accumulation_may_be_written_as_none():
    config = default_config()
    config.TRAIN.ACCUMULATION_STEPS = None
    require_counts(config)
