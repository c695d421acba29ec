"""internvl-ds ckpt: real output directories, damaged in every way; no ranks."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from internvl_ds.checkpoint.formats.state_json import state_text
from internvl_ds.checkpoint.tag import commit, verify
from internvl_ds.checkpoint.tag.hashing import write_hashed
from internvl_ds.checkpoint.tag.manifest import FORMAT, STATE_FILE, Header, Manifest, tag_name
from internvl_ds.checkpoint.tag.retention import KeepNewest
from internvl_ds.files import write_text
from internvl_ds.tools.cli import main
from internvl_ds.tools.text import human_age, human_size, table
from tests.harness.tags import save_tag

SHARD = 'mp_rank_00_model_states.pt'
CONFIG = 'MODEL:\n  NAME: vit\n'
TAG_KEYS = [
    'tag', 'path', 'size', 'epoch', 'max_accuracy', 'sequence', 'saved_at', 'zero_stage',
    'world_size', 'precision', 'global_steps', 'versions', 'step', 'frozen', 'linked',
    'verified', 'problems',
]  # fmt: skip


def save(output, epoch, best=None, accuracy=50.0, size=2000):
    """Saves a tag as save_checkpoint does, with two files; returns its directory."""
    tag = tag_name(epoch, best)
    state = {
        'epoch': epoch, 'max_accuracy': accuracy, 'max_accuracy_ema': 51.5, 'ema_decay': 0.999,
        'lr_scheduler': {'last_epoch': epoch, 'base_lrs': [0.1]}, 'scaler': None, 'config': CONFIG,
    }  # fmt: skip
    staging = commit.begin(output, tag)
    contents = {SHARD: b'w' * size, STATE_FILE: state_text(state).encode()}
    files = {
        name: write_hashed(staging.path / name, lambda file: file.write(content))
        for name, content in contents.items()
    }
    header = Header(
        tag=tag, epoch=epoch, max_accuracy=accuracy, sequence=commit.next_sequence(output),
        saved_at='2024-05-01T12:00:00+00:00', zero_stage=2, world_size=8, precision='bf16',
        global_steps=10, size=sum(entry.size for entry in files.values()),
        versions={'torch': '2.9'},
    )  # fmt: skip
    return commit.commit(staging, Manifest(header, files), latest=best is None)


def plain(output, name='global_step5'):
    """A tag as plain DeepSpeed leaves it."""
    (output / name).mkdir(parents=True)
    (output / name / SHARD).write_bytes(b'w' * 10)
    return output / name


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_checksum(tag):
    flip(tag / SHARD)


def damage_length(tag):
    os.truncate(tag / SHARD, 7)


def damage_presence(tag):
    (tag / SHARD).unlink()


def damage_manifest(tag):
    flip(tag / 'manifest.json')


def damage_manifests_presence(tag):
    (tag / 'manifest.json').unlink()


DAMAGES = {
    damage_checksum: 'its xxh3-128 is',
    damage_length: 'has 7 bytes, not 2000',
    damage_presence: f'{SHARD}',
    damage_manifest: 'manifest.json',
    damage_manifests_presence: 'manifest.json is missing',
}


@pytest.fixture
def ckpt(capsys):
    """Runs the command in this process; gives its status and what it printed."""

    def call(*words):
        capsys.readouterr()
        status = main(['ckpt', *map(str, words)])
        return status, capsys.readouterr().out

    return call


@pytest.fixture
def output(tmp_path):
    """Three epoch tags and a best one; ``latest`` names the third."""
    path = tmp_path / 'out'
    for epoch, accuracy in enumerate((40.0, 60.0, 50.0)):
        save(path, epoch, accuracy=accuracy)
    save(path, 1, best='best', accuracy=60.0)
    return path


class TestList:
    def test_newest_save_comes_first_and_latest_is_marked(self, ckpt, output):
        status, out = ckpt('list', output)

        titles, *rows = out.splitlines()
        assert status == 0
        assert titles.split()[:2] == ['tag', 'epoch']
        assert [row.split()[0] for row in rows] == [
            'ckpt_epoch_best', 'ckpt_epoch_2', 'ckpt_epoch_1', 'ckpt_epoch_0',
        ]  # fmt: skip
        assert [row for row in rows if '(latest)' in row] == [rows[1]]
        pattern = r'ckpt_epoch_2 \(latest\) +2 +50\.00 +2\.2 kB +\d+ d +2 x 8 +bf16 +sizes'
        assert re.fullmatch(pattern, rows[1])

    def test_plain_tags_come_last_and_are_not_verified(self, ckpt, output):
        os.utime(plain(output), (1, 1))
        plain(output, 'global_step6')

        status, out = ckpt('list', output)

        assert status == 3
        assert [line.split()[0] for line in out.splitlines()[-2:]] == [
            'global_step6', 'global_step5',
        ]  # fmt: skip
        assert out.splitlines()[-1].endswith('no manifest')

    def test_only_with_verify_are_contents_read(self, ckpt, output):
        damage_checksum(output / 'ckpt_epoch_2')

        assert ckpt('list', output)[0] == 0
        status, out = ckpt('list', output, '--verify')

        assert status == 1
        assert re.search(r'ckpt_epoch_2 .* DAMAGED: mp_rank_00_model_states\.pt: damaged', out)
        assert re.search(r'ckpt_epoch_1 .* checksums\n', out)
        assert 'resuming from ckpt_epoch_1 instead' in out

    @pytest.mark.parametrize('damage', [d for d in DAMAGES if d is not damage_checksum])
    def test_damage_that_sizes_show_is_told(self, ckpt, output, damage):
        damage(output / 'ckpt_epoch_1')
        plain(output)  # damage outweighs what has no manifest

        status, out = ckpt('list', output)

        assert status == 1
        (row,) = [line for line in out.splitlines() if 'DAMAGED' in line]
        assert row.startswith('ckpt_epoch_1 ')
        assert str(output) not in row

    def test_an_empty_directory_of_a_tags_name_is_damaged_and_others_are_no_tags(
        self, ckpt, output
    ):
        (output / 'ckpt_epoch_7').mkdir()
        (output / 'events').mkdir()

        status, out = ckpt('list', output)

        assert status == 1
        assert re.search(r'ckpt_epoch_7 .* DAMAGED: holds no checkpoint', out)
        assert 'events' not in out

    def test_sweep_are_counted(self, ckpt, output):
        staging = commit.begin(output, 'ckpt_epoch_3')
        (output / '.trash-ckpt_epoch_9-00000000').mkdir()

        status, out = ckpt('list', output)

        assert status == 0
        assert '1 save(s) under way, or left by a run that died' in out
        assert '1 tag(s) half removed' in out
        assert 'ckpt_epoch_3' not in out
        commit.abandon(staging)

    def test_what_stands_in_for_a_tag_is_listed_under_its_name(self, ckpt, output):
        (output / 'ckpt_epoch_2').rename(output / '.old-ckpt_epoch_2')

        tree = json.loads(ckpt('list', output, '--json')[1])

        (tag,) = [tag for tag in tree['tags'] if tag['tag'] == 'ckpt_epoch_2']
        assert tag['path'].endswith('.old-ckpt_epoch_2')
        assert tree['warning'] is None

    def test_json_has_the_documented_keys(self, ckpt, output):
        plain(output)

        status, out = ckpt('list', output, '--json')

        tree = json.loads(out)
        assert status == 3
        assert list(tree) == [
            'output', 'latest', 'resume', 'warning', 'stagings', 'trash', 'tags',
        ]  # fmt: skip
        assert tree['latest'] == tree['resume'] == 'ckpt_epoch_2'
        assert all(list(tag) == TAG_KEYS for tag in tree['tags'])
        assert tree['tags'][1]['max_accuracy'] == 50.0
        assert tree['tags'][-1] | {'path': ''} == dict.fromkeys(TAG_KEYS) | {
            'tag': 'global_step5', 'path': '', 'size': 10, 'verified': 'no manifest',
            'problems': [],
        }  # fmt: skip

    def test_a_missing_latest_is_told(self, ckpt, output):
        (output / 'latest').unlink()

        status, out = ckpt('list', output)

        assert status == 0
        assert '(latest)' not in out
        assert 'resuming from ckpt_epoch_2 instead' in out


class TestVerify:
    def test_an_output_directory_means_what_auto_resume_takes(self, ckpt, output):
        path = output / 'ckpt_epoch_2'

        assert ckpt('verify', output) == (0, f'{path}: all files are as written (2.2 kB)\n')
        assert ckpt('verify', path) == ckpt('verify', output)
        assert ckpt('verify', output, 'ckpt_epoch_2') == ckpt('verify', output)

    @pytest.mark.parametrize('damage', DAMAGES)
    def test_every_damage_is_found_and_named(self, ckpt, output, damage):
        path = output / 'ckpt_epoch_1'
        damage(path)

        assert ckpt('verify', output)[0] == 0
        for words in ([path], [output, 'ckpt_epoch_1'], [output, '--all']):
            status, out = ckpt('verify', *words)
            assert status == 1
            (line,) = [line for line in out.splitlines() if line.startswith('  ')]
            assert str(path) in line
            assert DAMAGES[damage] in line

    def test_a_latest_that_cannot_be_taken_is_verified_too(self, ckpt, output):
        damage_length(output / 'ckpt_epoch_2')

        status, out = ckpt('verify', output)

        assert status == 1
        assert f'{output / "ckpt_epoch_1"}: all files are as written' in out
        assert f'{output / "ckpt_epoch_2"}: DAMAGED' in out
        assert 'resuming from ckpt_epoch_1 instead' in out

    def test_no_whole_tag_is_damage_not_absence(self, ckpt, tmp_path):
        damage_presence(save(tmp_path, 0))
        assert ckpt('verify', tmp_path)[0] == 1
        (tmp_path / 'latest').unlink()
        assert ckpt('verify', tmp_path)[0] == 1

    def test_all_is_every_tag(self, ckpt, output):
        status, out = ckpt('verify', output, '--all')

        assert status == 0
        assert len(out.splitlines()) == 4

    def test_without_a_manifest_nothing_can_be_said(self, ckpt, tmp_path):
        status, out = ckpt('verify', plain(tmp_path))

        assert status == 3
        assert 'no manifest' in out

    def test_json_lists_every_problem(self, ckpt, output):
        path = output / 'ckpt_epoch_2'
        damage_checksum(path)
        flip(path / STATE_FILE)

        status, out = ckpt('verify', path, '--json')

        tree = json.loads(out)
        assert status == 1
        assert list(tree) == ['output', 'warning', 'tags']
        (tag,) = tree['tags']
        assert list(tag) == TAG_KEYS
        assert tag['verified'] == 'damaged'
        assert [SHARD in tag['problems'][0], STATE_FILE in tag['problems'][1]] == [True, True]


class TestShow:
    def test_says_all_of_the_header_files_and_state(self, ckpt, output):
        status, out = ckpt('show', output)

        assert status == 0
        for name, value in (
            ('tag', 'ckpt_epoch_2'), ('zero_stage', '2'), ('world_size', '8'),
            ('versions', 'torch'),
            ('saved_at', '2024-05-01'), ('format', str(FORMAT)), ('state: ema_decay', '0.999'),
            ('state: lr_scheduler', 'base_lrs, last_epoch'), ('state: scaler', '-'),
            ('problems', '-'), (SHARD, '2000'),
        ):  # fmt: skip
            assert re.search(rf'^{re.escape(name)} +{re.escape(value)}', out, re.MULTILINE), name
        assert 'MODEL' not in out

    def test_json_has_digests_and_the_documented_keys(self, ckpt, output):
        status, out = ckpt('show', output, 'ckpt_epoch_best', '--json')

        tree = json.loads(out)
        assert status == 0
        assert list(tree) == [*TAG_KEYS, 'format', 'files', 'state']
        assert [file['name'] for file in tree['files']] == [SHARD, STATE_FILE]
        assert all(re.fullmatch('[0-9a-f]{32}', file['xxh3_128']) for file in tree['files'])
        assert tree['state'] == {
            'epoch': 1, 'max_accuracy': 60.0, 'max_accuracy_ema': 51.5, 'ema_decay': 0.999,
            'lr_scheduler': ['base_lrs', 'last_epoch'], 'scaler': None, 'classes': None,
        }  # fmt: skip

    def test_how_many_class_names_a_tag_keeps(self, ckpt, tmp_path):
        path = save_tag(tmp_path, 0, state={'class_names': ['cat', 'dog']})

        assert json.loads(ckpt('show', path, '--json')[1])['state']['classes'] == 2
        assert re.search(r'^state: classes +2$', ckpt('show', path)[1], re.MULTILINE)

    def test_config_is_the_yaml_alone(self, ckpt, output):
        path = output / 'ckpt_epoch_0'

        assert ckpt('show', path, '--config') == (0, CONFIG)
        assert json.loads(ckpt('show', path, '--config', '--json')[1])['config'] == CONFIG

    def test_a_plain_tag_has_its_client_state_and_perhaps_no_config(self, ckpt, tmp_path, capsys):
        path = plain(tmp_path)
        head = {'module': {}, 'dp_world_size': 1, 'global_steps': 5, 'epoch': 4}
        torch.save(head, path / SHARD)

        status, out = ckpt('show', path, '--json')

        assert status == 3
        state = json.loads(out)['state']
        assert state['epoch'] == 4
        assert state['max_accuracy'] is None
        (file,) = json.loads(out)['files']
        assert file == {'name': SHARD, 'size': (path / SHARD).stat().st_size, 'xxh3_128': None}
        assert ckpt('show', path)[0] == 3
        assert main(['ckpt', 'show', str(path), '--config']) == 2
        assert 'keeps no config' in capsys.readouterr().err

    def test_a_plain_tag_that_cannot_be_read_is_a_problem(self, ckpt, tmp_path):
        status, out = ckpt('show', plain(tmp_path), '--json')

        assert status == 1
        assert json.loads(out)['state'] is None
        assert 'cannot be read' in json.loads(out)['problems'][0]

    @pytest.mark.parametrize('damage', DAMAGES)
    def test_a_damaged_tag_is_shown_as_far_as_it_goes(self, ckpt, output, damage):
        damage(output / 'ckpt_epoch_2')
        by_size = damage is not damage_checksum

        status, out = ckpt('show', output, 'ckpt_epoch_2')

        assert status == (1 if by_size else 0)
        assert STATE_FILE in out

    def test_a_state_that_is_no_json_is_a_problem(self, ckpt, output):
        path = output / 'ckpt_epoch_2' / STATE_FILE
        path.write_bytes(b'x' * path.stat().st_size)

        status, out = ckpt('show', output, '--json')

        assert status == 1
        assert json.loads(out)['verified'] == 'damaged'


class TestPrune:
    def tags(self, output):
        return sorted(path.name.removeprefix('ckpt_epoch_') for path in output.glob('ckpt_*'))

    def test_dry_run_says_what_goes_and_removes_nothing(self, ckpt, output):
        status, out = ckpt('prune', output, '--keep', 1, '--dry-run')

        assert status == 0
        assert out.splitlines() == [
            'would remove ckpt_epoch_0  2.2 kB',
            'would remove ckpt_epoch_1  2.2 kB',
            '2 tag(s) would go, 4.4 kB; 1 stay',
        ]
        assert self.tags(output) == ['0', '1', '2', 'best']

    def test_removes_what_dry_run_said(self, ckpt, output):
        dry = ckpt('prune', output, '--keep', 1, '--dry-run')[1]

        status, out = ckpt('prune', output, '--keep', 1)

        assert status == 0
        assert out == dry.replace('would remove', 'removed').replace('would go', 'went')
        assert self.tags(output) == ['2', 'best']
        assert ckpt('prune', output, '--keep', 1)[1] == '0 tag(s) went, 0 B; 1 stay\n'

    @pytest.mark.parametrize(
        ('words', 'left'),
        [
            (['--keep-best', '1'], ['1', '2', 'best']),
            (['--keep-every', '2'], ['0', '2', 'best']),
            (['--keep-best', '1', '--keep-every', '2'], ['0', '1', '2', 'best']),
        ],
    )
    def test_what_any_option_keeps_stays(self, ckpt, output, words, left):
        assert ckpt('prune', output, '--keep', 1, *words)[0] == 0
        assert self.tags(output) == left

    def test_what_a_rewound_run_left_behind_stays_without_a_word(self, ckpt, output):
        save(output, 0)  # gone back to: 1 and 2 are later training

        status, out = ckpt('prune', output, '--keep', 1)

        assert status == 0
        assert out.splitlines() == [
            '0 tag(s) went, 0 B; 3 stay',
            'of later training than ckpt_epoch_0: ckpt_epoch_1, ckpt_epoch_2 '
            '(--drop-later removes them too)',
        ]
        assert ckpt('prune', output, '--keep', 1, '--drop-later')[0] == 0
        assert self.tags(output) == ['0', 'best']

    def test_the_last_whole_tag_stays_when_newer_ones_are_damaged(self, ckpt, output):
        damage_length(output / 'ckpt_epoch_2')

        assert ckpt('prune', output, '--keep', 1)[0] == 0
        assert self.tags(output) == ['1', '2', 'best']

    def test_what_latest_names_stays(self, ckpt, output):
        write_text(output / 'latest', 'ckpt_epoch_0')

        assert ckpt('prune', output, '--keep', 1)[0] == 0
        assert self.tags(output) == ['0', '2', 'best']

    def test_without_any_whole_tag_nothing_is_removed(self, output, capsys):
        for path in output.glob('ckpt_*'):
            damage_presence(path)

        assert main(['ckpt', 'prune', str(output), '--keep', '1']) == 2
        assert 'nothing was removed: ' in capsys.readouterr().err
        assert self.tags(output) == ['0', '1', '2', 'best']

    def test_json_has_the_documented_keys(self, ckpt, output):
        status, out = ckpt('prune', output, '--keep', 2, '--json')

        tree = json.loads(out)
        size = tree['size']
        assert status == 0
        assert size > 2000
        assert tree == {
            'output': str(output), 'dry_run': False,
            'pruned': [{'tag': 'ckpt_epoch_0', 'size': size}], 'size': size,
            'kept': ['ckpt_epoch_1', 'ckpt_epoch_2'], 'failed': [],
        }  # fmt: skip

    def test_what_cannot_be_removed_is_told(self, ckpt, output, monkeypatch):
        def fail(path):
            raise PermissionError(13, 'Permission denied', str(path))

        monkeypatch.setattr(shutil, 'rmtree', fail)

        status, out = ckpt('prune', output, '--keep', 2)

        assert status == 2
        assert 'could not remove ckpt_epoch_0' in out

    @pytest.mark.parametrize('words', [[], ['--keep', '0'], ['--keep', 'x'], ['--keep-best', '1']])
    def test_keep_is_required_and_at_least_one(self, output, words):
        with pytest.raises(SystemExit) as caught:
            main(['ckpt', 'prune', str(output), *words])

        assert caught.value.code == 2
        assert len(self.tags(output)) == 4


class TestUserErrors:
    @pytest.mark.parametrize('action', [['list'], ['verify'], ['show'], ['prune', '--keep', '1']])
    def test_nothing_there_is_status_2_and_one_line(self, tmp_path, capsys, action):
        (tmp_path / 'empty').mkdir()
        (tmp_path / 'file').touch()
        for name, reason in (
            ('empty', 'no checkpoint tag in it'),
            ('missing', 'no such directory'),
            ('file', 'no such directory'),
        ):
            assert main(['ckpt', action[0], str(tmp_path / name), *action[1:]]) == 2
            out, err = capsys.readouterr()
            assert out == ''
            assert err == f'internvl-ds ckpt: error: {tmp_path / name}: {reason}\n'

    def test_a_tag_that_is_not_there_names_those_that_are(self, output, capsys):
        assert main(['ckpt', 'verify', str(output), 'ckpt_epoch_9']) == 2
        assert 'has ckpt_epoch_0, ckpt_epoch_1, ckpt_epoch_2, ckpt_epoch_best' in (
            capsys.readouterr().err
        )

    @pytest.mark.parametrize('action', [['list'], ['verify', '--all'], ['prune', '--keep', '1']])
    def test_a_tag_in_place_of_an_output_directory_is_told(self, output, capsys, action):
        path = output / 'ckpt_epoch_0'

        assert main(['ckpt', action[0], str(path), *action[1:]]) == 2
        assert f'is a tag; name its output directory, {output}' in capsys.readouterr().err

    def test_tag_and_all_exclude_each_other(self, output):
        with pytest.raises(SystemExit) as caught:
            main(['ckpt', 'verify', str(output), 'ckpt_epoch_0', '--all'])

        assert caught.value.code == 2

    @pytest.mark.parametrize('words', [['ckpt'], ['ckpt', 'list'], ['ckpt', 'prune']])
    def test_help_tells_the_exit_statuses(self, words, capsys):
        with pytest.raises(SystemExit):
            main([*words, '--help'])

        assert '3  nothing is damaged, but' in capsys.readouterr().out


class TestProcess:
    def test_the_list_is_the_same_in_a_process_of_its_own(self, ckpt, output):
        command = [sys.executable, '-m', 'internvl_ds.tools.cli', 'ckpt', 'list', str(output)]

        done = subprocess.run(command, capture_output=True, text=True, timeout=120)

        assert done.returncode == 0
        assert done.stderr == ''
        assert done.stdout == ckpt('list', output)[1]

    def test_neither_torch_nor_deepspeed_is_imported_for_a_list(self, output):
        code = (
            'import sys; from internvl_ds.tools.cli import main; '
            f'main(["ckpt", "list", {str(output)!r}]); '
            'main(["ckpt", "prune", sys.argv[1], "--keep", "9"]); '
            'sys.exit(str({"torch", "deepspeed"} & set(sys.modules)))'
        )

        assert _last_words(code, output) == 'set()'

    def test_deepspeed_is_not_imported_for_checksums_and_state(self, output):
        code = (
            'import sys; from internvl_ds.tools.cli import main; '
            'main(["ckpt", "verify", sys.argv[1]]); main(["ckpt", "show", sys.argv[1]]); '
            'sys.exit(str("deepspeed" in sys.modules))'
        )

        assert _last_words(code, output) == 'False'

    def test_a_reader_that_goes_away_is_no_error(self, output):
        damage_length(output / 'ckpt_epoch_1')
        reader, writer = os.pipe()
        os.close(reader)  # before the first line: what `| head -0` may come to
        command = [sys.executable, '-m', 'internvl_ds.tools.cli', 'ckpt', 'list', str(output)]

        with os.fdopen(writer, 'wb') as gone:
            done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, timeout=120)

        assert done.stderr == b''
        assert done.returncode == 1  # still true

    def test_ctrl_c_waits_for_no_file(self, ckpt, output, monkeypatch):
        done = threading.Event()
        monkeypatch.setattr(verify, 'damage', lambda *_: [] if done.wait(30) else ['late'])
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()

        status, _ = ckpt('verify', output)

        assert status == 130
        assert time.monotonic() - start < 15
        # nor does the end of the process
        assert all(t.daemon for t in threading.enumerate() if t is not threading.main_thread())
        done.set()

    def test_a_disk_that_is_full_for_the_answer_is_told_in_one_line(self, output):
        command = [sys.executable, '-m', 'internvl_ds.tools.cli', 'ckpt', 'list', str(output)]
        with Path('/dev/full').open('wb') as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=120)

        told = b'internvl-ds ckpt: error: the answer cannot be written: No space left on device\n'
        assert done.stderr == told
        assert done.returncode == 2


@pytest.mark.parametrize(
    ('size', 'text'),
    [
        (0, '0 B'), (999, '999 B'), (1000, '1.0 kB'), (999_949, '999.9 kB'), (999_950, '1.0 MB'),
        (1.4e9, '1.4 GB'), (2e15, '2.0 PB'), (2e18, '2000.0 PB'),
    ],
)  # fmt: skip
def test_sizes_are_decimal(size, text):
    assert human_size(size) == text


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(-5, '0 s'), (59.4, '59 s'), (60, '1 min'), (7199, '1 h'), (86400 * 400, '400 d')],
)
def test_ages_are_in_their_largest_unit(seconds, text):
    assert human_age(seconds) == text


def test_columns_are_aligned_and_lines_end_in_no_space():
    text = table(
        ('name', 'size', 'x'), [('a', '1', ''), ('long name', '100', 'y')], right=('size',)
    )

    assert text.splitlines() == ['name       size  x', 'a             1', 'long name   100  y']


def _last_words(code, output):
    """Runs code in a fresh interpreter, with the directory as its argument; what it exits with."""
    command = [sys.executable, '-c', code, str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stderr.strip()


@pytest.mark.parametrize(
    'words', [('prune', '--keep', '1'), ('verify', '--all'), ('list', '--verify')]
)
def test_beside_a_run_that_saves_and_prunes_nothing_is_called_damaged_or_failed(
    ckpt, output, words
):
    child = os.fork()
    if not child:
        for epoch in itertools.count(10):
            save(output, epoch, best='best')
            save(output, epoch)
            commit.prune(output, [KeepNewest(2)])
    try:
        bad, end = [], time.monotonic() + 8
        while time.monotonic() < end:
            status, out = ckpt(words[0], output, *words[1:])
            if status:
                bad.append(out)
        assert not os.waitpid(child, os.WNOHANG)[0], 'the run failed'
        assert bad == []
    finally:
        os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def test_a_tag_that_is_being_marked_for_removal_is_not_called_damaged(ckpt, output):
    save(output, 3)
    tag, end = output / 'ckpt_epoch_3', threading.Event()

    def mark():
        while not end.is_set():
            write_text(tag / commit.MARK, '{}')

    with ThreadPoolExecutor(1) as pool:
        marking = pool.submit(mark)
        try:
            found = {ckpt('list', output)[0] for _ in range(300)}
        finally:
            end.set()
        marking.result(timeout=30)

    assert found == {0}
