"""The words for what is wrong with a ds_config."""

from __future__ import annotations

import json

from internvl_ds.config.ds.diagnostics import (
    Diagnostic,
    diagnostic,
    nearest,
    pointer_of,
    shown,
)
from internvl_ds.config.tree import value_at


def test_a_finding_names_its_pointer_and_its_yacs_key_once():
    assert str(Diagnostic('/a/b', '/a/b is wrong')) == '/a/b is wrong'
    assert str(Diagnostic('/a/b', 'not as /a/bc', yacs='A')) == '/a/b: not as /a/bc [A]'
    assert str(Diagnostic('', 'A is wrong', yacs='A')) == 'A is wrong'
    assert diagnostic('/gradient_clipping', 'x').yacs == 'TRAIN.CLIP_GRAD'
    assert diagnostic('/steps_per_print', 'x').yacs == ''


def test_pointers_are_those_of_the_rfc():
    assert pointer_of(('a', 'b/c', 'd~e')) == '/a/b~1c/d~0e'
    assert pointer_of(()) == ''


def test_values_are_shown_as_json_and_cut():
    assert shown(True) == 'true'
    assert shown('1') == '"1"'
    assert len(shown(list(range(100)))) == 60
    assert json.loads(shown({1, 2})) == '{1, 2}'  # what is no JSON at all is shown too


def test_the_nearest_name_is_found_in_any_case_of_letters():
    known = ['stage', 'overlap_comm']
    assert nearest('Stge', known, 0.6) == 'stage'
    assert nearest('OVERLAP_COM', known, 0.6) == 'overlap_comm'
    assert nearest('nothing_like_it', known, 0.6) is None


def test_a_value_is_looked_up_through_whatever_stands_on_the_way():
    assert value_at({'a': {'b': 1}}, 'a', 'b') == 1
    assert value_at({'a': 3}, 'a', 'b', default='none') == 'none'
    assert value_at({'a': None}, 'a') is None
