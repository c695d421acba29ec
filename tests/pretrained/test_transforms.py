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


@pytest.mark.parametrize(('old', 'grid'), [(3, (5, 7)), (7, (5, 3))])
def test_a_grid_that_is_not_square_where_the_model_says_it(old, grid):
    table, embed = torch.randn(old * old, 5), torch.randn(1, old * old, 4)
    length = grid[0] * grid[1]
    target = {
        'relative_position_bias_table': TensorSpec(torch.Size((length, 5)), torch.float32, grid),
        'absolute_pos_embed': TensorSpec(torch.Size((1, length, 4)), torch.float32, grid),
    }
    state = {'relative_position_bias_table': table, 'absolute_pos_embed': embed}
    got = transforms.resize_bias_tables(state, target).state['relative_position_bias_table']
    image = table.t().reshape(1, 5, old, old)
    image = F.interpolate(image, size=grid, mode='bicubic', align_corners=False)
    assert torch.equal(got, image.flatten(2)[0].t())
    result = transforms.resize_absolute_pos_embeds(state, target)
    image = embed.transpose(1, 2).reshape(1, 4, old, old)
    image = F.interpolate(image, size=grid, mode='bicubic', align_corners=False)
    assert torch.equal(result.state['absolute_pos_embed'], image.flatten(2).transpose(1, 2))
    sizes = f'{old}x{old} -> {grid[0]}x{grid[1]}'
    assert result.notes == (Note(f'resized 1 absolute_pos_embed {sizes}'),)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('prefix', [0, 1, 5])
def test_resize_timm_pos_embed_keeps_the_tokens_before_the_grid(dtype, prefix):
    embed = torch.randn(1, prefix + 16, 8).to(dtype)
    spec = TensorSpec(torch.Size((1, prefix + 6 * 5, 8)), torch.bfloat16, (6, 5), prefix)
    result = transforms.resize_pos_embeds({'trunk.pos_embed': embed}, {'trunk.pos_embed': spec})
    image = embed[:, prefix:].float().transpose(1, 2).reshape(1, 8, 4, 4)
    image = F.interpolate(image, size=(6, 5), mode='bicubic', antialias=True)
    expected = torch.cat([embed[:, :prefix].float(), image.flatten(2).transpose(1, 2)], 1)
    assert torch.equal(result.state['trunk.pos_embed'], expected.bfloat16())
    assert result.notes == (Note('resized trunk.pos_embed 4x4 -> 6x5'),)


def test_timm_pos_embed_that_cannot_be_resized():
    spec = TensorSpec(torch.Size((1, 17, 8)), torch.float32, (4, 4), 1)
    result = transforms.resize_pos_embeds({'pos_embed': torch.zeros(1, 10, 4)}, {'pos_embed': spec})
    assert result.state == {}
    assert 'pos_embed: left out: cannot be resized' in result.notes[0].text
    # Of a grid that is no square, or other tokens before it: random embeddings would train badly.
    for length in (8, 18):
        state = {'pos_embed': torch.zeros(1, length, 8)}
        with pytest.raises(PretrainedError) as caught:
            transforms.resize_pos_embeds(state, {'pos_embed': spec})
        text = str(caught.value)
        assert f'(1, {length}, 8) in the checkpoint, (1, 17, 8) in the model' in text
        assert text.endswith("MODEL.PRETRAINED_RENAME [['^pos_embed$', 'left_out']]")
    same = {'pos_embed': torch.zeros(1, 17, 8)}
    assert transforms.resize_pos_embeds(same, {'pos_embed': spec}) == (same, ())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_resize_patch_embed(dtype):
    key = 'patch_embed.proj.weight'
    kernel = torch.randn(6, 3, 14, 14).to(dtype)
    result = transforms.resize_patch_embeds(
        {key: kernel}, specs(**{key: torch.zeros(6, 3, 16, 16)})
    )
    # The least-squares inverse of enlarging an image patch, by hand: so that the embedding of an
    # enlarged patch stays what it was (FlexiViT, arXiv 2212.08013, section 3.4).
    basis = torch.eye(14 * 14).reshape(-1, 1, 14, 14)
    enlarge = (
        F.interpolate(basis, size=(16, 16), mode='bicubic', antialias=True).flatten(1).double()
    )
    expected = kernel.double().flatten(2) @ torch.linalg.pinv(enlarge.T)
    # timm computes the inverse in float32
    assert torch.allclose(result.state[key].double().flatten(2), expected, rtol=0, atol=1e-4)
    assert result.state[key].dtype == torch.float32
    assert result.notes == (Note('resized patch_embed.proj.weight 14x14 -> 16x16'),)


def test_internvit_of_the_hugging_face_naming():
    names = {
        'embeddings.class_embedding': 'cls_token',
        'embeddings.position_embedding': 'pos_embed',
        'embeddings.patch_embedding.weight': 'patch_embed.proj.weight',
        'embeddings.patch_embedding.bias': 'patch_embed.proj.bias',
        'encoder.layers.0.norm1.weight': 'blocks.0.norm1.weight',
        'encoder.layers.0.norm2.bias': 'blocks.0.norm2.bias',
        'encoder.layers.11.attn.qkv.weight': 'blocks.11.attn.qkv.weight',
        'encoder.layers.11.attn.proj.bias': 'blocks.11.attn.proj.bias',
        'encoder.layers.11.attn.q_norm.weight': 'blocks.11.attn.q_norm.weight',
        'encoder.layers.11.mlp.fc1.weight': 'blocks.11.mlp.fc1.weight',
        'encoder.layers.11.mlp.fc2.bias': 'blocks.11.mlp.fc2.bias',
        'encoder.layers.11.ls1': 'blocks.11.ls1.gamma',
        'encoder.layers.11.ls2': 'blocks.11.ls2.gamma',
    }
    state = numbered(*names)
    result = transforms.rename_internvit(state, {})
    assert result.state == {new: state[old] for old, new in names.items()}
    assert result.notes == (Note('InternViT: renamed 13 keys'),)
    other = numbered('encoder.layers.0.ls1')
    assert transforms.rename_internvit(other, {}) == (other, ())


def test_rename_by_pairs_of_regular_expressions():
    step = transforms.rename_by([(r'^layers\.(\d+)', r'blocks.\1'), ('gamma_1', 'ls1.gamma')])
    state = numbered('layers.3.gamma_1', 'norm.w')
    result = step(state, {})
    assert list(result.state) == ['blocks.3.ls1.gamma', 'norm.w']
    assert result.notes == (Note('renamed 1 keys'),)
    assert transforms.rename_by([])(state, {}) == (state, ())
    for bad in ([('(', 'x')], ['abc'], [('a',)], [3]):
        with pytest.raises(PretrainedError, match='MODEL.PRETRAINED_RENAME holds .* no pair'):
            transforms.rename_by(bad)


def test_grid_orientation_survives():
    # A ramp along the rows stays a ramp along the rows: sides are not swapped.
    rows = torch.arange(8.0).repeat_interleave(8)[:, None]
    out = transforms.resize_grid(rows, 4).view(4, 4)
    assert torch.equal(out, out[:, :1].expand(4, 4))
    assert (out[1:] > out[:-1]).all()


def test_a_patch_embed_of_other_channels_is_left_as_it_is():
    key = 'patch_embed.proj.weight'
    state = {key: torch.ones(8, 4, 14, 14)}
    result = transforms.resize_patch_embeds(state, {key: TensorSpec((8, 3, 16, 16), torch.float32)})
    assert result.state[key] is state[key]
    assert result.notes == ()
