"""Leaves out, under an earlier DeepSpeed, tests of what 0.19.8 reads and says."""

import pytest

from tests.harness.model import OLD_DEEPSPEED

OF_NOW = {
    'test_a_fault_gives_one_error_at_its_place',
    'test_what_is_right_gives_no_finding_and_deepspeed_takes_it',
    'test_what_ships_gives_no_finding_at_any_level_that_it_supports',
    'test_no_json_of_deepspeeds_package_gives_a_false_alarm',
    'test_any_key_misspelt_in_a_right_one_is_the_one_finding',
    'test_what_is_refused_or_unused_says_so_once',
    'test_defaults_harmless_values_and_blocks_that_are_off_say_nothing',
    'test_the_table_in_the_documents_is_that_of_the_installed_version',
    'test_keys_are_found_by_every_way_to_read_them',
    'test_limits_choices_defaults_and_deprecation_are_the_models',
    'test_what_is_only_read_to_be_refused_is_no_known_key',
    'test_a_field_that_a_version_adds_is_known_and_one_that_it_drops_is_not',
    'test_a_file_resolves_at_every_level_that_it_supports',
}


def pytest_collection_modifyitems(items):
    reason = 'an earlier DeepSpeed reads other keys, and more is refused'
    for item in items:
        if OLD_DEEPSPEED and item.originalname in OF_NOW:
            item.add_marker(pytest.mark.skip(reason=reason))
