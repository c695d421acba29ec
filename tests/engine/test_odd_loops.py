"""Two engines in one process, and frozen layers that are recomputed, beside plain PyTorch."""

import pytest

from tests.engine import odd_loops
from tests.harness.model import OLD_DEEPSPEED
from tests.harness.ranks import run_ranks


@pytest.mark.ranks
def test_two_engines_train_against_each_other_save_and_resume(tmp_path):
    stages = [0, 1, 2, 3]
    right = odd_loops.adversaries_alone()
    for result in run_ranks(
        odd_loops.adversaries, 2, tmp_path, timeout=100, stages=stages, root=str(tmp_path)
    ):
        for stage in stages:
            for name, values in right.items():
                # Four updates of sums of 16 terms, 2^-24 each; AdamW divides by small roots.
                assert result[str(stage)][name] == pytest.approx(values, rel=1e-4, abs=1e-5), (
                    stage, name,
                )  # fmt: skip


@pytest.mark.ranks
def test_gradients_that_would_be_left_in_another_engine_are_refused(tmp_path):
    stages = [0, 1, 2, 3]
    for said in run_ranks(odd_loops.not_frozen, 2, tmp_path, stages=stages, root=str(tmp_path)):
        assert len(said) == len(stages)
        for text in said:
            assert text.startswith(
                "the loss of this engine goes through another engine's module to"
            )
            assert 'requires_grad_(False)' in text


@pytest.mark.ranks
def test_frozen_norms_are_recomputed_with_the_numbers_of_kept_ones(tmp_path):
    # DeepSpeed 0.17 frees frozen parameters in between, and torch says so in the backward.
    stages = [0, 1, 2] if OLD_DEEPSPEED else [0, 1, 2, 3]
    for result in run_ranks(odd_loops.recomputed, 2, tmp_path, timeout=100, stages=stages):
        right = result['0 False']
        assert len(right) > 20
        for name, weights in result.items():
            for parameter, values in weights.items():
                # Two updates of sums of some hundred products, 2^-24 each.
                assert values == pytest.approx(right[parameter], rel=1e-4, abs=1e-6), (
                    name, parameter,
                )  # fmt: skip
