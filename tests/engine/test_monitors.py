"""Monitors of a ds_config that cannot be written: turned off. A run: test_train_restart.py."""

from internvl_ds.engine.monitors import drop_unwritable_monitors


def test_what_cannot_be_written_is_turned_off_and_said(tmp_path, caplog):
    (tmp_path / 'file').touch()
    good = {'enabled': True, 'output_path': str(tmp_path), 'job_name': 'good'}
    tree = {
        'tensorboard': good,
        'csv_monitor': {'enabled': True, 'output_path': str(tmp_path / 'file')},
        'wandb': {'enabled': False},
    }
    drop_unwritable_monitors(tree, timeout=5)
    assert tree['tensorboard'] == good
    assert tree['csv_monitor'] == {'enabled': False, 'output_path': str(tmp_path / 'file')}
    assert f'{tmp_path / "file" / "DeepSpeedJobName"}: cannot be written (NotADir' in caplog.text
    assert len(caplog.records) == 1
    assert list((tmp_path / 'good').iterdir()) == []


def test_without_monitors_nothing_is_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for tree in ({}, {'tensorboard': {'enabled': False}}):
        before = dict(tree)
        drop_unwritable_monitors(tree, timeout=5)
        assert tree == before
    assert list(tmp_path.iterdir()) == []
