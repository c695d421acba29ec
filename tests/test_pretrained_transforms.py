"""Each step of the adaptation, on hand-written dictionaries."""

import pytest
import torch
import torch.nn.functional as F

from internvl_ds.errors import PretrainedError
from internvl_ds.pretrained import transforms
from internvl_ds.pretrained.transforms import Note, TensorSpec


def specs(**tensors):
    return {key.replace('__', '.'): TensorSpec(t.shape, t.dtype) for key, t in tensors.items()}


def numbered(*keys):
    return {key: torch.tensor(i) for i, key in enumerate(keys)}


@pytest.mark.parametrize('name', ['model', 'module'])
def test_unwrap_takes_the_named_entry(name):
    inner = numbered('a', 'b')
    result = transforms.unwrap({'epoch': 3, name: inner}, {})
    assert result.state is inner
    assert result.notes == (Note(f"took the 2 entries under '{name}'"),)


def test_unwrap_prefers_model_and_else_takes_the_mapping_itself():
    inner, other, bare = numbered('a'), numbered('b'), numbered('c')
    assert transforms.unwrap({'module': other, 'model': inner}, {}).state is inner
    assert transforms.unwrap({'module': other, 'model': None}, {}).state is other
    assert transforms.unwrap(bare, {}) == (bare, ())
    # A parameter may have that name.
    tensors = numbered('model', 'head')
    assert transforms.unwrap(tensors, {}).state is tensors


def test_unwrap_refuses_what_is_no_state_dict():
    with pytest.raises(PretrainedError, match='not a state dict: 7 is a key'):
        transforms.unwrap({'model': {7: torch.zeros(1)}}, {})


@pytest.mark.parametrize('first', ['student.x', 'teacher.x'])
def test_take_student(first):
    state = numbered(first, 'student.a.weight', 'teacher.a.weight', 'student_proj.b', 'other')
    before = dict(state)
    result = transforms.take_student(state, {})
    expected = {'x': state['student.x']} if first == 'student.x' else {}
    assert result.state == expected | {'a.weight': state['student.a.weight']}
    assert state == before
    assert result.notes == (Note(f'took the student: {len(result.state)} of 5 entries'),)


def test_take_student_looks_at_the_first_key_only():
    state = numbered('a', 'student.a')
    assert transforms.take_student(state, {}) == (state, ())
    assert transforms.take_student({}, {}) == ({}, ())


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
    result = transforms.take_sim(state, {})
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
    assert transforms.take_sim(state, {}).state == {'a': state['dcnv3.a']}
    other = numbered('a', 'mask_token')
    assert transforms.take_sim(other, {}) == (other, ())


def test_drop_rebuilt():
    state = numbered(
        'l.0.relative_position_index', 'l.0.w', 'l.0.attn_mask', 'l.0.relative_coords_table'
    )
    result = transforms.drop_rebuilt(state, {})
    assert result.state == {'l.0.w': state['l.0.w']}
    assert result.notes == (Note('dropped 3 buffers that the model builds itself'),)
    assert transforms.drop_rebuilt(result.state, {}) == (result.state, ())


def bicubic_table(table, side):
    """The original's route: heads as channels of one contiguous image."""
    old = int(len(table) ** 0.5)
    image = table.float().t().contiguous().view(1, table.shape[1], old, old)
    image = F.interpolate(image, size=(side, side), mode='bicubic', align_corners=False)
    return image.view(table.shape[1], side * side).t()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(('old', 'new'), [(7, 13), (13, 7), (3, 4)])
def test_resize_bias_tables(old, new, dtype):
    table = torch.randn(old * old, 5).to(dtype)
    key = 'l.0.relative_position_bias_table'
    state = {key: table, 'w': torch.zeros(2)}
    target = specs(l__0__relative_position_bias_table=torch.zeros(new * new, 5), w=torch.zeros(2))
    result = transforms.resize_bias_tables(state, target)
    assert list(result.state) == [key, 'w']
    assert result.state[key].dtype == torch.float32
    assert torch.equal(result.state[key], bicubic_table(table, new))
    assert state[key] is table
    text = f'resized 1 relative_position_bias_table {old}x{old} -> {new}x{new}'
    assert result.notes == (Note(text),)


def test_resized_table_gets_the_dtype_of_the_model():
    table = torch.randn(9, 2)
    target = specs(relative_position_bias_table=torch.zeros(16, 2, dtype=torch.bfloat16))
    state = {'relative_position_bias_table': table.bfloat16()}
    out = transforms.resize_bias_tables(state, target).state['relative_position_bias_table']
    expected = bicubic_table(table.bfloat16(), 4).to(torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_notes_count_tables_of_each_size():
    state = {f'{i}.relative_position_bias_table': torch.zeros(9, 2) for i in range(4)}
    target = {key: TensorSpec(torch.Size((16, 2)), torch.float32) for key in state}
    target['3.relative_position_bias_table'] = TensorSpec(torch.Size((25, 2)), torch.float32)
    assert transforms.resize_bias_tables(state, target).notes == (
        Note('resized 3 relative_position_bias_table 3x3 -> 4x4'),
        Note('resized 1 relative_position_bias_table 3x3 -> 5x5'),
    )


@pytest.mark.parametrize(
    ('old', 'new', 'words'),
    [
        ((9, 2), (16, 3), '2 heads in the checkpoint, 3 in the model'),
        ((9, 2), (9, 3), '2 heads in the checkpoint, 3 in the model'),
        ((10, 2), (16, 2), 'must be squares: 10 in the checkpoint, 16 in the model'),
        ((9, 2), (732, 2), 'must be squares: 9 in the checkpoint, 732 in the model'),
    ],
)
def test_table_that_cannot_be_resized_is_left_out(old, new, words):
    key = 'relative_position_bias_table'
    state = {key: torch.zeros(old), 'w': torch.zeros(1)}
    target = specs(relative_position_bias_table=torch.zeros(new))
    result = transforms.resize_bias_tables(state, target)
    assert list(result.state) == ['w']
    (note,) = result.notes
    assert note.is_warning
    assert note.text.startswith(f'{key}: left out: ')
    assert words in note.text


def test_tables_that_fit_or_that_the_model_lacks_stay():
    state = {
        'relative_position_bias_table': torch.zeros(10, 2),
        'b.relative_position_bias_table': torch.zeros(9, 2),
        'absolute_pos_embed': torch.zeros(1, 9, 2),
    }
    table, embed = torch.zeros(10, 2), torch.zeros(4)
    target = specs(relative_position_bias_table=table, absolute_pos_embed=embed)
    for step in (transforms.resize_bias_tables, transforms.resize_absolute_pos_embeds):
        assert step(state, target) == (state, ())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_resize_absolute_pos_embeds(dtype):
    embed = torch.randn(1, 14 * 14, 8).to(dtype)
    target = specs(absolute_pos_embed=torch.zeros(1, 16 * 16, 8))
    result = transforms.resize_absolute_pos_embeds({'absolute_pos_embed': embed}, target)
    image = embed.float().transpose(1, 2).reshape(1, 8, 14, 14)
    image = F.interpolate(image, size=(16, 16), mode='bicubic', align_corners=False)
    expected = image.flatten(2).transpose(1, 2)
    assert torch.equal(result.state['absolute_pos_embed'], expected)
    assert result.notes == (Note('resized 1 absolute_pos_embed 14x14 -> 16x16'),)


@pytest.mark.parametrize(
    ('old', 'new', 'words'),
    [
        ((1, 9, 2), (1, 16, 3), '2 dim in the checkpoint, 3 in the model'),
        ((1, 10, 2), (1, 16, 2), 'must be squares: 10 in the checkpoint, 16 in the model'),
    ],
)
def test_pos_embed_that_cannot_be_resized_is_left_out(old, new, words):
    target = specs(absolute_pos_embed=torch.zeros(new))
    result = transforms.resize_absolute_pos_embeds({'absolute_pos_embed': torch.zeros(old)}, target)
    assert result.state == {}
    (note,) = result.notes
    assert note.is_warning
    assert words in note.text


def test_grid_orientation_survives():
    # A ramp along the rows stays a ramp along the rows: sides are not swapped.
    rows = torch.arange(8.0).repeat_interleave(8)[:, None]
    out = transforms.resize_grid(rows, 4).view(4, 4)
    assert torch.equal(out, out[:, :1].expand(4, 4))
    assert (out[1:] > out[:-1]).all()
