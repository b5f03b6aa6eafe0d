"""Runs the robustness tests and records their figures.

python run.py bench robustness          (other arguments go to pytest; only figures of the selected tests are updated)

Figures are the values that tests pass to pytest's ``record_property``, such as cases tried, steps interrupted and
memory growth. Runs are cancelled at every interrupt point, and all damaged files are tried. `run.py test --all` tries
only a sample.
"""

import json
import sys
from pathlib import Path

import pytest

from .environment import RESULTS, write_results

FOLDER = Path(__file__).parents[2] / "tests" / "robustness"
# names of tests and figures that differ, {in tests/robustness: in the result file}; tables.json uses the latter names
RECORDED_AS = {
    "test_invalid_inputs.py": "test_wrong_wires.py",
    "test_graph_has_every_node": "test_every_node_stands_in_the_graph",
    "test_error_names_node_input_value_and_remedy": "test_the_message_names_node_input_value_and_remedy",
    "test_malformed_bodies_rejected": "test_bodies_that_are_no_workflow",
    "test_odd_node_names_accepted": "test_odd_names_of_nodes",
    "test_server_survives_garbage_on_the_websocket": "test_garbage_on_the_websocket",
    "test_run_finishes_without_its_client": "test_the_run_ends_without_its_client_and_the_next_gets_the_same",
    "test_run_can_be_interrupted_after_its_client_disconnected": "test_an_interrupt_after_its_client_has_gone",
    "test_damaged_files_rejected_or_usable": "test_damaged_files_are_refused_or_of_use",
    "test_special_file_rejected_without_blocking": "test_what_is_no_file_is_refused_and_never_waited_for",
    "test_special_files_do_not_hide_masked_token_models": "test_odd_things_among_masked_token_models_hide_none",
    "test_folder_with_a_pipe_for_its_list_rejected": "test_a_pipe_in_place_of_the_list_is_no_data_set",
    "test_invalid_input_rejected_or_handled": "test_what_is_wired_wrong",
    "test_error_names_the_expert_with_an_incompatible_prompt": "test_an_expert_that_cannot_read_its_prompt_is_named",
    "test_out_of_memory_error_is_not_replaced": "test_want_of_memory_stays_what_it_is",
    "test_no_partial_file_after_a_kill": "test_killed_at_any_moment_no_half_file_is_left",
    "test_memory_does_not_grow_in_two_hundred_runs": "test_memory_after_two_hundred_runs",
    "test_error_names_the_model_and_the_step": "test_whose_prediction_it_was_and_when",
    "test_non_finite_prediction_outside_the_region_rejected": "test_where_an_expert_does_not_paint_it_is_refused_too",  # plain: ok
    "test_non_finite_base_outside_the_experts_window_rejected": "test_the_base_alone",
    "test_non_finite_patch_after_the_blend_is_not_attributed_to_an_expert": "test_a_patch_after_the_blend_is_not_the_experts_fault",
    "test_non_finite_initial_latent_rejected": "test_a_latent_that_is_none_to_begin_with",
    "test_non_finite_head_output_names_the_head": "test_a_head_that_gives_none",
    "test_non_finite_prediction_before_a_head_names_the_model": "test_a_model_that_gives_a_head_none",
    "test_non_finite_expert_under_a_head_is_named": "test_an_expert_under_a_head_is_named",
    "test_non_finite_network_output_names_its_cause": "test_a_network_that_gives_none",
    "test_encoding_of_a_non_finite_image_rejected": "test_pictures_that_hold_none_have_no_tokens",
    "test_non_finite_face_is_left_unchanged_and_reported": "test_faces_that_cannot_be_refined_are_left_and_told_of",
    "test_non_finite_input_face_is_not_attributed_to_the_refiner": "test_a_face_of_none_is_not_the_refiners_fault",
    "test_out_of_memory_reported_without_leaks": "test_want_of_memory_is_told_and_leaves_nothing",
    "test_out_of_memory_in_the_preview_keeps_the_trained_head": "test_of_the_pictures_of_a_result_none_is_worth_the_training",
    "test_seed_search_uses_smaller_batches_if_memory_is_short": "test_seeds_are_searched_a_few_at_a_time_where_memory_is_short",
    "test_nothing_is_written_outside_or_overwritten": "test_nothing_is_written_outside_and_nothing_replaced",
    "test_repeated_name_gets_the_next_number": "test_the_same_name_again_gets_another_number",
    "test_links_in_a_data_set_to_the_outside_rejected": "test_links_inside_a_data_set_are_not_followed_out",
    "test_link_at_the_target_path_is_not_followed": "test_a_link_where_the_file_shall_be_is_not_followed",
    "test_server_rejects_names_that_it_does_not_offer": "test_the_server_refuses_what_it_did_not_offer",
    "test_error_about_the_prefix_reaches_the_user": "test_a_refusal_reaches_the_user_from_its_node",
    "test_all_runs_have_different_results": "test_every_work_is_another",
    "test_two_clients_of_one_server_with_a_cancelled_run": "test_two_clients_of_one_server_with_a_cancelled_run_between",
    "points with a kept result": "kept what there was",  # plain: ok
    "invalid values": "things",
}


def recorded(name: str) -> str:
    """The key in the result file for a test such as "test_a.py::test_b[case]"."""
    file, _, test = name.partition("::")
    function, bracket, case = test.partition("[")
    return f"{RECORDED_AS.get(file, file)}::{RECORDED_AS.get(function, function)}{bracket}{case}"


class Figures:
    """A pytest plugin that collects the figures, the outcome and the seconds of every test."""

    def __init__(self):
        self.tests = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.partition(f"{FOLDER.name}/")[2]
            figures = {RECORDED_AS.get(figure, figure): value for figure, value in report.user_properties}
            entry = {"outcome": report.outcome, "seconds": round(report.duration, 1), **figures}
            self.tests[recorded(name)] = entry


def previous_figures() -> dict:
    """The figures of the result file, or an empty dict."""
    file = RESULTS / "robustness.json"
    return json.loads(file.read_text(encoding="utf-8"))["tests"] if file.exists() else {}


def main() -> int:
    figures = Figures()
    arguments, sys.argv[1:] = sys.argv[1:], []  # so that the recorded command has no arguments
    sampled = ("test_interrupts.py::test_cancel_at_some_steps", "test_file_loaders.py::test_some_damaged_files")
    # the complete versions of these tests run instead
    deselected = [word for name in sampled for word in ("--deselect", f"tests/robustness/{name}")]
    code = pytest.main([str(FOLDER), "-q", *deselected, *arguments], plugins=[figures])
    if code == 0:
        print(
            write_results("robustness", {"tests": previous_figures() | figures.tests if arguments else figures.tests})
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
