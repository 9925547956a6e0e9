"""The kinds of faults that a run, a preparation and their files are held against, and the tests of each kind.

`bash tests/run.sh -m faults` runs them all: those that are marked `faults`, which inject faults into real runs for
minutes, and those named here that run always.
"""

KILLS = "tests/faults/test_kills.py::test_run_that_is_killed_forty_times_is_equal_to_the_bit"
DAMAGE = "tests/faults/test_damaged_files.py::test_all_damage_is_found"
SUPERVISION = "tests/faults/test_supervision.py::"
NUMBERS = "tests/faults/test_disk_and_numbers.py::"
RECORDS = "tests/data/files/test_records.py::"
LOADING = "tests/config/test_loading.py::"
ERRORS = "tests/cli/test_user_errors.py::"

KINDS: dict[str, tuple[str, ...]] = {
    "kill -9 of a rank, the launcher, a loader worker or all of them, in a step, save, prune, start or validation": (
        KILLS,
        SUPERVISION + "test_no_process_and_no_file_survives_a_kill_of_launcher_and_ranks_and_the_next_run",
    ),
    "kill -9 at any byte of a save": (
        "tests/checkpoint/test_save.py::test_a_kill_at_any_step_of_a_save_over_the_only_checkpoint_loses_nothing",
        "tests/platform/files/test_durable.py::test_a_replacement_that_was_killed_at_any_step_loses_nothing",
    ),
    "kill -9 of a preparation or one of its workers": (
        "tests/data/prepare/test_run.py::test_kill_9_at_twenty_random_moments_gives_the_same_bytes",
        "tests/data/prepare/test_run.py::test_kill_9_of_the_command_and_its_workers_gives_the_same_bytes",
    ),
    "a lost node, a node that does not come up": (
        SUPERVISION + "test_lost_node_is_named",
        SUPERVISION + "test_node_that_does_not_come_up_is_named",
        "tests/examples/test_slurm.py::"
        "test_stages_on_two_nodes_come_through_a_preemption_and_a_lost_node_as_if_undisturbed",
    ),
    "SIGSTOP of a rank or a loader worker, a rank that hangs": (
        SUPERVISION + "test_frozen_rank_is_named_within_its_limit_and_five_seconds",
        SUPERVISION + "test_frozen_loader_worker_of_the_only_rank_is_named",
        SUPERVISION + "test_rank_that_hangs_is_named_with_its_stack",
        SUPERVISION + "test_rank_whose_save_hangs_is_named",
    ),
    "SIGTERM, SIGUSR1 and Ctrl-C at any moment, twice, to one process or to all": (
        SUPERVISION + "test_signal_to_every_process_twice_loses_no_step",
        SUPERVISION + "test_signal_to_one_rank_stops_the_job_like_one_to_the_launcher",
        SUPERVISION + "test_stop_while_a_node_is_missing_ends_the_job_soon",
        "tests/cli/test_train.py::test_run_that_is_stopped_during_a_validation_saves_and_asks_to_be_requeued",
    ),
    "two jobs on one folder": ("tests/cli/test_train.py::test_second_job_on_the_folder_is_refused",),
    "truncated, flipped, holed, deleted, swapped and stale files of checkpoints and shards": (
        DAMAGE,
        "tests/checkpoint/test_load.py::test_a_damaged_newest_falls_back_with_one_warning",
        "tests/data/loading/test_loader.py::test_flipped_bit_names_dataset_shard_and_sample",
    ),
    "files that would run code": (
        "tests/cli/test_hostile_checkpoint.py::test_a_hostile_index_runs_no_code",
        "tests/cli/test_hostile_checkpoint.py::test_training_starts_from_no_hostile_index",
    ),
    "a full disk, a folder that cannot be written": (
        NUMBERS + "test_full_disk_costs_no_checkpoint_and_ends_the_run_after_so_many_saves",
        "tests/checkpoint/test_save.py::test_a_disk_that_fills_up_at_any_byte_leaves_the_previous_checkpoint_as_it_was",
        "tests/platform/launch/test_exit_status.py::test_error_of_the_disk_is_storage_and_names_the_file",
        ERRORS + "test_wrong_options_of_a_preparation_are_one_line",
    ),
    "another layout, worker count or micro-batch at a resume": (
        "tests/checkpoint/test_resume.py::test_another_layout_goes_on_with_the_same_losses",
        "tests/data/loading/test_loader.py::test_global_batches_do_not_depend_on_ranks_workers_or_micro_batch",
    ),
    "a loss, gradient or weight that is not finite": (
        NUMBERS + "test_loss_that_is_not_finite_on_one_rank_ends_the_run_and_reaches_no_checkpoint",
        "tests/training/test_step.py::test_what_is_not_finite_or_not_planned_changes_neither_weights_nor_optimizer",
        "tests/checkpoint/test_finite.py::test_weights_that_are_not_finite_replace_no_checkpoint",
    ),
    "samples that the plan does not name": (
        "tests/cli/test_train.py::test_run_whose_loader_swaps_two_rows_on_one_rank_ends_before_the_step_is_saved",
    ),
    "bad JSON: truncated, wrong types, duplicate keys, huge lines, deep nesting, no UTF-8, BOM, CRLF": (
        RECORDS + "test_a_bad_line_is_rejected_and_its_neighbours_are_intact",
        RECORDS + "test_truncated_array_keeps_what_is_whole",
        RECORDS + "test_a_huge_record_takes_bounded_memory_and_time",
        RECORDS + "test_bom_and_crlf_and_blank_lines_are_no_part_of_the_records",
    ),
    "captions with placeholders and control tokens": (
        "tests/data/text/test_templates.py::test_other_numbers_of_placeholders_than_images_are_rejected",
        "tests/data/text/tokenizers/test_byte_pair.py::test_no_text_becomes_a_control_token_and_all_come_back",
    ),
    "damaged pictures and bombs": (
        "tests/data/images/test_checking.py::test_random_damage_is_rejected_or_taken_but_never_another_error",
        "tests/data/images/test_checking.py::test_bombs_are_rejected_from_the_header_in_under_ten_milliseconds",
    ),
    "paths that leave the data folder": (
        "tests/data/sources/test_image_store.py::test_paths_that_leave_the_folder_are_rejected",
        "tests/data/files/test_locations.py::test_names_that_leave_the_prefix_or_have_no_object_are_rejected",
    ),
    "configs with unknown keys, wrong types, numbers as text, without an end": (
        LOADING + "test_unknown_key_is_named_with_its_line_and_the_nearest_key",
        LOADING + "test_value_of_a_wrong_type_is_named_with_what_was_expected",
        LOADING + "test_number_may_be_written_as_the_field_writes_it",
        LOADING + "test_a_hostile_value_is_named_by_its_key_in_a_short_line",
        ERRORS + "test_wrong_setting_is_one_line_and_exit_code_78",
        ERRORS + "test_config_file_that_cannot_be_read_is_one_line_and_exit_code_78",
    ),
}
"""Test functions by kind, each as `file::name`."""

NAMES = frozenset(name for names in KINDS.values() for name in names)
