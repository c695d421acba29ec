"""Which entry, network and prefixes: the steps that find the weights in a checkpoint."""

import pytest
import torch

from internvl_ds.errors import PretrainedError
from internvl_ds.pretrained.transforms import Note
from internvl_ds.pretrained.unwrapping import (
    drop_inner_wrappers,
    strip_prefixes,
    take_part,
    unwrap,
    unwrap_by,
)
from tests.pretrained.test_transforms import numbered, specs


@pytest.mark.parametrize('name', ['model', 'module'])
def test_unwrap_takes_the_named_entry(name):
    inner = numbered('a', 'b')
    result = unwrap({'epoch': 3, name: inner}, {})
    assert result.state is inner
    assert result.notes == (Note(f"took the 2 entries under '{name}'"),)


def test_unwrap_prefers_model_and_else_takes_the_mapping_itself():
    inner, other, bare = numbered('a'), numbered('b'), numbered('c')
    assert unwrap({'module': other, 'model': inner}, {}).state is inner
    assert unwrap({'module': other, 'model': None}, {}).state is other
    assert unwrap(bare, {}) == (bare, ())
    # A parameter may have that name.
    tensors = numbered('model', 'head')
    assert unwrap(tensors, {}).state is tensors


@pytest.mark.parametrize(
    'wrapper', ['_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module']
)
def test_wrappers_of_parts_are_taken_out(wrapper):
    state = numbered('a', f'b.0.{wrapper}.c.w', f'b.1.{wrapper}.c.{wrapper}.w')
    specs = numbered('a', 'b.0.c.w', 'b.1.c.w')
    result = drop_inner_wrappers(state, specs)
    assert result.state == specs
    assert [note.text for note in result.notes] == ['took the names of wrappers out of 2 keys']
    assert drop_inner_wrappers(state, state) == (state, ())  # the model is wrapped itself
    whole = numbered(f'{wrapper}.a')
    assert strip_prefixes(drop_inner_wrappers(whole, specs).state, specs).state == numbered('a')


@pytest.mark.parametrize('name', [
    'state_dict', 'model_state_dict', 'teacher', 'student', 'model_ema', 'state_dict_ema', 'ema',
])  # fmt: skip
def test_unwrap_knows_the_entries_of_other_projects(name):
    inner = numbered('a', 'b')
    file = {'epoch': 3, 'args': None, name: inner}
    assert unwrap(file, {}).state is inner
    assert unwrap({'epoch': 1, 'state_dict': file}, {}).state is inner


def test_unwrap_says_what_else_is_there():
    file = {'model': numbered('a'), 'model_ema': numbered('b'), 'optimizer': {'state': {}}}
    (note,) = unwrap(file, {}).notes
    assert note.text == (
        "took the 1 entries under 'model'; MODEL.PRETRAINED_KEY takes another: model_ema"
    )


def test_unwrap_by_a_key():
    teacher, inner = numbered('a'), numbered('b')
    file = {'model': numbered('x'), 'teacher': teacher, 'run': {'net': {'best': inner}}}
    assert unwrap_by('teacher')(file, {}).state is teacher
    assert unwrap_by('run.net.best')(file, {}).state is inner
    assert unwrap_by('')(file, {}).state is file['model']
    dotted = {'run.net': inner, **file}
    assert unwrap_by('run.net')(dotted, {}).state is inner
    flat = {'state_dict': numbered('teacher.a', 'student.a', 'teacher.b')}
    result = unwrap_by('teacher')(flat, {})
    assert result.state == {'a': torch.tensor(0), 'b': torch.tensor(2)}
    assert result.notes == (Note("took the 2 entries under 'teacher'"),)
    words = "nothing under MODEL.PRETRAINED_KEY '{}'; entries that hold others: model, teacher, run"
    for key in ('ema', 'run.none', 'run.net.best.b', 'model.x.y'):
        with pytest.raises(PretrainedError, match=words.format(key)):
            unwrap_by(key)(file, {})


def test_unwrap_refuses_what_is_no_state_dict():
    with pytest.raises(PretrainedError, match='not a state dict: 7 is a key'):
        unwrap({'model': {7: torch.zeros(1)}}, {})


@pytest.mark.parametrize('first', ['student.x', 'teacher.x'])
def test_take_student(first):
    state = numbered(first, 'student.a.weight', 'teacher.a.weight', 'student_proj.b', 'other')
    before = dict(state)
    result = take_part(state, {})
    expected = {'x': state['student.x']} if first == 'student.x' else {}
    assert result.state == expected | {'a.weight': state['student.a.weight']}
    assert state == before
    assert result.notes == (Note(f'took the student: {len(result.state)} of 5 entries'),)


def test_the_first_key_decides_where_nothing_else_does():
    state = numbered('a', 'student.a')
    assert take_part(state, {}) == (state, ())
    assert take_part({}, {}) == ({}, ())


@pytest.mark.parametrize('first', ['mask_token', 'teacher_temp', 'student_proj.weight', 'z'])
def test_the_model_decides_before_the_first_key(first):
    target = specs(a__w=torch.zeros(1), b__w=torch.zeros(1))
    plain = numbered(first, 'a.w', 'b.w')
    assert take_part(plain, target) == (plain, ())
    both = numbered(first, 'teacher.a.w', 'teacher.b.w', 'student.a.w', 'student.b.w')
    assert take_part(both, target).state == {'a.w': both['student.a.w'], 'b.w': both['student.b.w']}
    teacher = numbered(first, 'module.teacher.backbone.a.w', 'module.teacher.backbone.b.w')
    result = take_part(teacher, target)
    assert list(strip_prefixes(result.state, target).state) == ['a.w', 'b.w']
    assert result.notes == (Note('took the teacher: 2 of 3 entries'),)
    own = specs(teacher__a=torch.zeros(1), student__a=torch.zeros(1))
    pair = numbered(first, 'teacher.a', 'student.a')
    assert take_part(pair, own) == (pair, ())


def test_take_sim():
    state = numbered(
        'mask_token',
        'dcnv3.levels.0.weight',
        'mm_dcnv3.levels.0.weight',
        'clip_projector.norm.weight',
        'decoder.weight',
        'clip.classifier_ln.weight',
        'clip.classifier_ln.bias',
        'clip.classifier.weight',
        'clip.classifier.bias',
    )
    result = take_part(state, {})
    assert result.state == {
        'levels.0.weight': state['dcnv3.levels.0.weight'],
        'clip_projector.norm.weight': state['clip_projector.norm.weight'],
        'fc_norm.weight': state['clip.classifier_ln.weight'],
        'fc_norm.bias': state['clip.classifier_ln.bias'],
        'head.weight': state['clip.classifier.weight'],
        'head.bias': state['clip.classifier.bias'],
    }
    assert result.notes == (Note('took the SIM backbone and classifier: 6 of 9 entries'),)


def test_take_sim_without_a_classifier_and_of_other_files():
    state = numbered('mask_token', 'dcnv3.a')
    assert take_part(state, {}).state == {'a': state['dcnv3.a']}
    other = numbered('a', 'mask_token')
    assert take_part(other, {}) == (other, ())


@pytest.mark.parametrize('prefixes', [
    'model.', 'encoder.', 'model.encoder.', 'encoder.backbone.module.', 'module.model._orig_mod.',
    '_orig_mod.vision_model.encoder.', 'backbone.model.backbone.',
])  # fmt: skip
def test_strip_prefixes_in_any_order_and_depth(prefixes):
    target = specs(a__w=torch.zeros(1), b__w=torch.zeros(1))
    state = numbered(f'{prefixes}mask_token', f'{prefixes}a.w', f'{prefixes}b.w', 'decoder.a')
    result = strip_prefixes(state, target)
    assert list(result.state) == ['mask_token', 'a.w', 'b.w', 'decoder.a']
    assert list(result.state.values()) == list(state.values())


def test_an_encoder_in_names_of_its_own_stays():
    state = numbered('vision_model.encoder.layers.0.w', 'vision_model.embeddings.w')
    result = strip_prefixes(state, specs(blocks__0__w=torch.zeros(1)))
    assert list(result.state) == ['encoder.layers.0.w', 'embeddings.w']


def test_strip_prefixes_that_the_model_does_not_have():
    state = numbered('module._orig_mod.backbone.a.w', 'module.head.w')
    target = specs(a__w=torch.zeros(1), head__w=torch.zeros(1))
    result = strip_prefixes(state, target)
    assert list(result.state) == ['a.w', 'head.w']
    assert [note.text for note in result.notes] == [
        'took the prefix module. off 2 keys',
        'took the prefix _orig_mod. off 1 keys',
        'took the prefix backbone. off 1 keys',
    ]
    own = specs(backbone__a=torch.zeros(1))
    kept = numbered('backbone.a')
    assert strip_prefixes(kept, own) == (kept, ())
    with pytest.raises(PretrainedError, match='several keys of the checkpoint become a'):
        strip_prefixes(numbered('module.a', 'a'), specs(a=torch.zeros(1)))
