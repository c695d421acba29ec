"""Keys and types of a ds_config, against small schemas and the installed one."""

from __future__ import annotations

import math

import pytest

from internvl_ds.config.ds.diagnostics import WARNING
from internvl_ds.config.ds.schema import BOOL, INT, LIST, NULL, NUMBER, OBJECT, TEXT, Key, Value
from internvl_ds.config.ds.validate_keys import Shape, check_shape, misfit

SCHEMA = Key(keys={
    'steps': Key('steps', Value((INT,), above=0)),
    'block': Key('block', Value((OBJECT,)), keys={
        'flag': Key('flag', Value((BOOL,))),
        'old': Key('old', Value((BOOL,)), deprecated=True, successor='flag'),
    }),
    'open': Key('open', Value((OBJECT,)), keys={'number': Key('number')}, complete=False),
    'gone': Key('gone', refused='it was removed'),
})  # fmt: skip


@pytest.mark.parametrize(
    ('value', 'spec', 'words'),
    [
        (5e8, Value((INT,)), ''),  # as JSON writes large whole numbers
        (5.5, Value((INT,)), 'a whole number'),
        (True, Value((INT,)), 'is true; it takes a whole number'),
        (1, Value((BOOL,)), 'true or false'),
        ('true', Value((BOOL,)), '(without the quotation marks)'),
        ('1e-8', Value((NUMBER,)), '(without the quotation marks)'),
        ('small', Value((NUMBER,)), 'is "small"; it takes a number'),
        (None, Value((TEXT,)), 'is null; it takes a text'),
        (None, Value((TEXT, NULL), ('a',)), ''),
        ('B', Value((TEXT,), ('a', 'b')), "'b' is the nearest"),
        (4, Value((INT,), (0, 1)), 'it takes 0, 1'),
        (0, Value((INT,), above=0), 'more than 0'),
        (0, Value((INT,), least=0), ''),
        (-1, Value((INT,), least=0), 'at least 0'),
        (1, Value((INT,), most=1), ''),
        (1.5, Value((NUMBER,), most=1), 'at most 1'),
        (1.0, Value((NUMBER,), below=1), 'less than 1'),
        (-1, Value((NUMBER,), least=0), 'at least 0'),
        (math.inf, Value((NUMBER,)), 'no finite number'),
        ([1, 'x'], Value((LIST,), items=Value((INT,))), 'has entry 1, which is "x"'),
        ((0.9, 0.999), Value((LIST,)), ''),  # from Python, not from JSON
        ({'any': 1}, Value(), ''),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_value(value, spec, words):
    assert words in misfit(value, spec)
    assert bool(misfit(value, spec)) == bool(words)


def test_what_is_misspelt_goes_on_under_the_name_that_was_meant():
    shape = check_shape({'blok': {'flg': True}, 'step': 'many'}, SCHEMA)
    assert [f.pointer for f in shape.findings] == ['/blok', '/blok/flg', '/step']
    assert shape.tree == {'block': {'flag': True}}
    assert shape.doubts('/steps')  # nobody knows what it was to be
    assert not shape.doubts('/block/flag')


def test_what_is_stated_rightly_too_is_not_overwritten():
    shape = check_shape({'step': 3, 'steps': 4}, SCHEMA)
    assert [f.pointer for f in shape.findings] == ['/step']
    assert shape.tree == {'steps': 4}


def test_a_key_at_the_wrong_place_is_told_where_it_belongs():
    (found,) = check_shape({'flag': True}, SCHEMA, SCHEMA).findings
    assert str(found) == '/flag: unknown key; the nearest known key is /block/flag'


def test_where_more_may_stand_only_what_is_much_alike_is_a_misspelling():
    assert check_shape({'open': {'another': 1, 'num': 2}}, SCHEMA).findings == []
    assert len(check_shape({'open': {'numbr': 1}}, SCHEMA).findings) == 1


def test_a_deprecated_key_is_a_warning_unless_its_successor_is_stated_too():
    (found,) = check_shape({'block': {'old': True}}, SCHEMA).findings
    assert (found.severity, found.message) == (WARNING, 'is deprecated; use flag')
    (found,) = check_shape({'block': {'old': True, 'flag': True}}, SCHEMA).findings
    assert 'its successor flag is stated as well' in str(found)
    assert found.severity != WARNING


def test_what_deepspeed_refuses_by_name_is_told_in_its_words():
    shape = check_shape({'gone': 1}, SCHEMA)
    assert [str(f) for f in shape.findings] == ['/gone: it was removed']
    assert shape.tree == {}


def test_keys_that_are_no_text_are_unknown():
    assert [f.pointer for f in check_shape({7: 1}, SCHEMA).findings] == ['/7']  # type: ignore[dict-item]


def test_what_lies_in_a_doubtful_block_is_doubtful():
    shape = Shape(doubtful={'/block'})
    assert shape.doubts('/block/flag')
    assert shape.doubts('/steps', '/block')
    assert not shape.doubts('/blocks', '/steps')


def test_a_misspelt_key_does_not_take_the_place_of_the_right_one():
    for tree in ({'stepz': 1, 'steps': 2}, {'steps': 2, 'stepz': 1}):
        shape = check_shape(tree, SCHEMA)
        assert shape.tree == {'steps': 2}
        assert len(shape.findings) == 1
