"""Files that are as the save before wrote them: linked, by comparison of all bytes; no ranks."""

import errno
import logging
import os

import pytest
import torch

from internvl_ds.checkpoint.formats.ema_files import identity_in, open_safetensors
from internvl_ds.checkpoint.tag import unchanged, verify
from internvl_ds.checkpoint.tag.hashing import hash_file
from internvl_ds.checkpoint.tag.manifest import Identity, Manifest
from internvl_ds.checkpoint.tag.shared import counted_again, freed_by
from internvl_ds.checkpoint.tag.unchanged import Unchanged, write_anew
from internvl_ds.checkpoint.tag.verify import damage
from internvl_ds.files.ema_shard import EmaFile
from tests.harness.tags import make_header

NAMES = {'pt': 'mp_rank_00_model_states.pt', 'ema': 'ema_rank_0.safetensors'}
MIB = 1 << 20


def value(kind, last=1.0, more=3 * MIB):
    """Content of some MiB, whose last element is given."""
    tensors = {'x': torch.zeros(more, dtype=torch.bfloat16), 'y': torch.tensor([2.0, last])}
    return (
        EmaFile(NAMES['ema'], tensors, {'decay': '0.5'}) if kind == 'ema' else {**tensors, 'n': 7}
    )


def save(linker, output, tag, content, kind, updates=3):
    """One save of one file; returns its path, entry and what the manifest would say."""
    linker.begin(Identity(tag, f'save of {tag}', 0), updates)
    (output / tag).mkdir(parents=True)
    path = output / tag / NAMES[kind]
    entry = linker.write(content, path)
    said = linker.linked
    linker.committed(output / tag)
    assert entry == hash_file(path)
    return path, entry, said


@pytest.fixture(params=NAMES)
def kind(request):
    return request.param


def test_the_same_bytes_get_a_link_and_others_a_file(tmp_path, kind):
    linker = Unchanged()
    first, entry, said = save(linker, tmp_path, 'a', value(kind), kind)
    second, again, linked = save(linker, tmp_path, 'b', value(kind), kind)
    assert (said, linked) == ({}, {'save of a': 'a'})
    assert again == entry
    assert second.samefile(first)
    for tag, other in {'c': value(kind, last=-1.0), 'd': value(kind, more=MIB)}.items():
        path, _, said = save(linker, tmp_path, tag, other, kind)
        assert (said, path.stat().st_nlink) == ({}, 1)
    path, entry, _ = save(linker, tmp_path, 'e', value(kind), kind)  # the last is compared
    assert path.stat().st_nlink == 1
    path, _, said = save(linker, tmp_path, 'f', value(kind), kind)
    assert (said, path.stat().st_nlink) == ({'save of e': 'e'}, 2)
    # The next one after a link: the file says who wrote it first.
    path, _, said = save(linker, tmp_path, 'g', value(kind), kind)
    assert (said, path.stat().st_nlink) == ({'save of e': 'e'}, 3)
    header = make_header('g', 0, save='save of g', linked=said)
    assert damage(tmp_path / 'g', Manifest(header, {path.name: entry}), [path.name]) == []
    for linked in ({}, {'save of e': 'x'}, {'x': 'e'}):
        header = make_header('g', 0, save='save of g', linked=linked)
        (text,) = damage(tmp_path / 'g', Manifest(header, {path.name: entry}), [path.name])
        assert "rank 0's file of save save of e of e" in text


@pytest.mark.parametrize('where', [0, MIB + 1, -1])
def test_an_earlier_file_that_changed_on_disk_is_written_anew(tmp_path, kind, where):
    linker = Unchanged()
    first, entry, _ = save(linker, tmp_path, 'a', value(kind), kind)
    status, content = first.stat(), bytearray(first.read_bytes())
    content[where] ^= 1
    first.write_bytes(content)
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns))
    second, again, said = save(linker, tmp_path, 'b', value(kind), kind)
    assert (said, second.samefile(first)) == ({}, False)
    assert again.size == entry.size
    assert first.read_bytes() == bytes(content)


def gone(path):
    path.unlink()


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def a_link(path):
    path.rename(path.with_name('elsewhere'))
    path.symlink_to('elsewhere')


def longer(path):
    with path.open('ab') as file:
        file.write(b'x')


@pytest.mark.parametrize('change', [gone, a_pipe, a_link, longer])
def test_what_is_no_file_of_that_size_any_more_is_written_anew(tmp_path, change):
    linker = Unchanged()
    first, _, _ = save(linker, tmp_path, 'a', value('pt'), 'pt')
    change(first)
    path, _, said = save(linker, tmp_path, 'b', value('pt'), 'pt')
    assert (said, path.stat().st_nlink, path.is_symlink()) == ({}, 1, False)


@pytest.mark.parametrize('number', [errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_without_hard_links_it_is_written_and_said_once(tmp_path, monkeypatch, caplog, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, 'link', refuse)
    caplog.set_level(logging.INFO)
    linker = Unchanged()
    for tag in 'abc':
        path, _, said = save(linker, tmp_path, tag, value('pt'), 'pt')
        assert (said, path.stat().st_nlink) == ({}, 1)
    (record,) = caplog.records
    assert 'no hard link' in record.message
    assert os.strerror(number) in record.message


def test_what_cannot_be_read_is_named_and_written_anew(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    linker = Unchanged()
    first, _, _ = save(linker, tmp_path, 'a', value('pt'), 'pt')
    monkeypatch.setattr(unchanged.os, 'pread', fail)
    path, _, said = save(linker, tmp_path, 'b', value('pt'), 'pt')
    assert (said, path.samefile(first)) == ({}, False)
    assert f'{first}: cannot be read any more, and is written anew' in caplog.text


def test_a_file_is_never_written_in_place(tmp_path, kind):
    linker = Unchanged()
    first, entry, _ = save(linker, tmp_path, 'a', value(kind), kind)
    second, _, _ = save(linker, tmp_path, 'b', value(kind), kind)
    write_anew(value(kind, last=5.0), second, Identity('b', 'other', 0))
    assert hash_file(first) == entry
    assert hash_file(second) != entry


def test_another_directory_of_tags_gets_a_copy_of_its_own(tmp_path):
    linker = Unchanged()
    save(linker, tmp_path / 'one', 'a', value('pt'), 'pt')
    path, _, said = save(linker, tmp_path / 'two', 'a', value('pt'), 'pt')
    assert (said, path.stat().st_nlink) == ({}, 1)


def test_a_save_that_was_not_committed_is_no_earlier_one(tmp_path):
    linker = Unchanged()
    linker.begin(Identity('a', 'a', 0), 3)
    (tmp_path / 'a').mkdir()
    linker.write(value('pt'), tmp_path / 'a' / NAMES['pt'])
    path, _, said = save(linker, tmp_path, 'b', value('pt'), 'pt')
    assert (said, path.stat().st_nlink) == ({}, 1)


def test_what_cannot_be_written_is_the_same_error_as_at_the_first_save(tmp_path):
    linker = Unchanged()
    save(linker, tmp_path, 'a', value('pt'), 'pt')
    (tmp_path / 'b').mkdir()
    linker.begin(Identity('b', 'b', 0), 3)
    with pytest.raises(Exception, match=r"local object '.*<lambda>'"):
        linker.write({**value('pt'), 'f': lambda: None}, tmp_path / 'b' / NAMES['pt'])


@pytest.mark.parametrize('pieces', [[b'abc'], [b'abc', b'def', b'x'], [b'abcdeX'], []])
def test_a_part_of_the_file_or_more_than_it_is_another_file(tmp_path, pieces):
    (tmp_path / 'file').write_bytes(b'abcdef')

    def write(file):
        for piece in pieces:
            file.write(piece)

    with (tmp_path / 'file').open('rb') as file:
        assert not unchanged._is_same(write, file, 6)
        assert unchanged._is_same(lambda other: other.write(b'abcdef'), file, 6)


def test_a_difference_ends_the_comparison_at_once(tmp_path, monkeypatch):
    linker = Unchanged()
    with open_safetensors(save(linker, tmp_path, 'e', value('ema'), 'ema')[0]) as file:
        assert identity_in(file.metadata())['tag'] == 'e'
    first, _, _ = save(linker, tmp_path, 'a', value('pt'), 'pt')
    counts, real = [], os.pread
    monkeypatch.setattr(unchanged.os, 'pread', lambda d, n, at: counts.append(n) or real(d, n, at))
    save(linker, tmp_path, 'b', {**value('pt'), 'n': 8}, 'pt')
    assert 0 < sum(counts) < 4096 < first.stat().st_size
    counts.clear()
    save(linker, tmp_path, 'c', {**value('pt'), 'n': 8}, 'pt', updates=4)
    assert counts == []
    _, _, said = save(linker, tmp_path, 'd', {**value('pt'), 'n': 8}, 'pt', updates=4)
    assert said == {'save of c': 'c'}


def test_links_are_counted_once_by_size_and_by_reading(tmp_path, monkeypatch):
    linker = Unchanged()
    tags = [tmp_path / tag for tag in 'abc']
    entries = [save(linker, tmp_path, tag.name, value('pt'), 'pt')[1] for tag in tags]
    size = entries[0].size
    (tags[1] / 'own').write_bytes(b'123')
    (tags[1] / 'elsewhere').symlink_to(tags[0] / NAMES['pt'])
    assert counted_again(tags) == 2 * size
    assert counted_again(tags[:1]) == 0
    assert [freed_by(tags[:n]) for n in range(4)] == [0, 0, 3, size + 3]
    reads, known, real = [], {}, hash_file
    monkeypatch.setattr(verify, 'hash_file', lambda *a: reads.append(a) or real(*a))
    for tag in tags:
        manifest = Manifest(make_header('a', 0), {NAMES['pt']: entries[0]})
        assert damage(tag, manifest, manifest.files, known) == []
    assert len(reads) == 1
    content = bytearray((tags[0] / NAMES['pt']).read_bytes())
    content[-1] ^= 1
    (tags[0] / NAMES['pt']).write_bytes(content)
    assert 'damaged' in damage(tags[1], manifest, manifest.files, known)[0]
