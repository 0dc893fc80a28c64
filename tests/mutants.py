"""Deliberate faults in the code that matters, each of which named tests must notice.

    python -m tests.mutants [WORD ...]

First the named tests pass as the code is. Then each fault is made in a copy of the repository,
and every test that is named beside it must fail. Words choose the faults whose file or tests
contain one of them. A change of the code may leave a fault without its text: give it the new
text, or replace it by another fault of the same place.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from shutil import copy2

ROOT = Path(__file__).parents[1]
NO_FAILURE = 0
SOME_FAILED = 1


@dataclass(frozen=True)
class Mutant:
    """A fault, and the tests that notice it.

    Attributes:
        file: File below ``upreid_ray``.
        old: Text that occurs in it once.
        new: Text that takes its place.
        tests: Tests (below ``tests``) that must fail, each in one of its cases at least.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = [
    # The losses.
    Mutant(
        "core/losses.py",
        "positive = (query * key).sum(dim=1, keepdim=True) / temperature",
        "positive = (query * key).sum(dim=1, keepdim=True)",
        ("core/test_losses.py::test_info_nce_is_its_formula", "core/test_golden.py"),
    ),
    Mutant(
        "core/losses.py",
        "F.kl_div(prediction, target,",
        "F.kl_div(target, prediction,",
        ("core/test_losses.py::test_global_consistency_is_its_formula",),
    ),
    Mutant(
        "core/losses.py",
        "masked_fill(~positive, torch.inf).amin(",
        "masked_fill(~positive, -torch.inf).amax(",
        ("core/test_losses.py::test_intrinsic_contrastive_is_its_formula",),
    ),
    Mutant(
        "core/losses.py",
        "nearest = distances.masked_fill(same, torch.inf).amin(dim=1)",
        "nearest = distances.masked_fill(same, 0).amax(dim=1)",
        ("core/test_finetuning.py::test_the_triplet_loss_is_its_formula",),
    ),
    Mutant(
        "core/cluster_contrast.py",
        "momentum * present + (1 - momentum) * batch[i]",
        "momentum * batch[i] + (1 - momentum) * present",
        ("core/test_cluster_contrast.py::test_the_memory_takes_in_one_image_after_the_other",),
    ),
    # The queue, and the key encoder that fills it.
    Mutant(
        "core/key_queue.py",
        "batch = batch[-size:]",
        "batch = batch[:size]",
        ("core/test_key_queue.py::test_the_queue_holds_the_last_keys_in_order",),
    ),
    Mutant(
        "core/key_queue.py",
        "self.oldest.add_(len(batch) * ~is_skipped)",
        "self.oldest.add_(len(batch))",
        ("core/test_training.py::test_a_step_that_is_not_finite_changes_nothing[query]",),
    ),
    Mutant(
        "core/model.py",
        "(is_taken.double() * (1 - momentum))",
        "(is_taken.double() * momentum)",
        ("core/test_model.py::test_the_key_encoder_keeps_the_share_of_its_momentum",),
    ),
    Mutant(
        "core/training.py",
        "back = draw.shuffle.argsort()",
        "back = draw.shuffle",
        ("core/test_training.py::test_keys_are_of_their_images_whatever_the_shuffle",),
    ),
    # Statistics of batch normalization.
    Mutant(
        "core/model.py",
        "    with running_statistics(encoder, momentum=0):\n        return encoder(",
        "    with running_statistics(encoder, momentum=0.1):\n        return encoder(",
        ("core/test_model.py::test_patches_leave_the_running_statistics_of_the_query_encoder",),
    ),
    Mutant(
        "core/encoder.py",
        "momentum / (num_groups - momentum * (num_groups - 1 - index))",
        "momentum / num_groups",
        ("core/test_encoder.py::test_groups_in_turn_leave_the_statistics_of_groups_at_once",),
    ),
    Mutant(
        "core/training.py",
        "statistics.restore(where=state.is_skipped)",
        "statistics.restore(where=state.is_skipped & False)",
        ("core/test_training.py::test_a_step_that_is_not_finite_changes_nothing[query]",),
    ),
    # Several processes.
    Mutant(
        "core/distributed.py",
        "order = source.argsort(stable=True).argsort()",
        "order = source.argsort(stable=True)",
        ("core/test_distributed.py::test_permuted_rows_are_the_joined_rows_in_that_order",),
    ),
    Mutant(
        "core/distributed.py",
        "[part[:count] for part, count in",
        "[part[-count:] for part, count in",
        ("core/test_distributed.py::test_rows_of_unequal_parts_are_gathered",),
    ),
    Mutant(
        "core/training.py",
        'terms["loss"] / self.num_groups_per_worker',
        'terms["loss"] / len(self.groups)',
        ("core/test_training.py::test_the_weights_of_two_processes_are_those_of_one",),
    ),
    # Skipped steps and checkpoints.
    Mutant(
        "core/training.py",
        'loss = loss * self._one_if_finite(means["loss"])',
        "loss = loss * 1",
        (
            "core/test_training.py::test_a_step_that_is_not_finite_changes_nothing"
            "[query statistics]",
        ),
    ),
    Mutant(
        "core/checkpoint.py",
        '{"state": saved["state"], "param_groups": groups}',
        '{"state": {}, "param_groups": groups}',
        ("core/test_training.py::test_four_steps_are_two_saved_restored_and_two_more",),
    ),
    Mutant(
        "core/checkpoint.py",
        "if _hash(folder / name) != hashes.get(name):",
        "if name not in hashes:",
        ("core/test_training.py::test_a_damaged_checkpoint_is_told_with_its_file",),
    ),
    Mutant(
        "core/checkpoint.py",
        'scores.get("mAP", 0.0) <= self.scores["mAP"]',
        'scores.get("mAP", 0.0) >= self.scores["mAP"]',
        ("core/test_training.py::test_the_best_backbone_is_the_one_with_the_best_map",),
    ),
    # Schedules and scores.
    Mutant(
        "core/schedule.py",
        "return peak * (step + 1) / warmup_steps",
        "return peak * step / warmup_steps",
        ("core/test_schedule.py::test_the_learning_rate_rises_linearly_and_falls_as_a_cosine",),
    ),
    Mutant(
        "core/retrieval.py",
        "kept = ~(same_pid & same_camera)",
        "kept = ~same_camera",
        ("core/test_retrieval.py::test_images_of_others_by_the_same_camera_count",),
    ),
    Mutant(
        "core/retrieval.py",
        "(index < column[part, None])",
        "(index <= column[part, None])",
        ("core/test_retrieval.py::test_equal_distances_rank_in_gallery_order",),
    ),
    Mutant(
        "core/reranking.py",
        "shared.data > 2 / 3 * sizes",
        "shared.data > 1 / 3 * sizes",
        ("core/test_reranking.py::test_reranking_is_that_of_plain_loops",),
    ),
    # The order of the images, and where a resumed run continues it.
    Mutant(
        "data/stream/training.py",
        "Block(epoch, row, row + size, seen * group_size)",
        "Block(epoch, row, row + size, 0)",
        ("data/stream/test_stream.py::test_starting_at_a_step_continues_the_order",),
    ),
    Mutant(
        "data/stream/training.py",
        "np.random.default_rng((seed, epoch)).permutation(",
        "np.random.default_rng(seed).permutation(",
        ("data/stream/test_stream.py::test_which_images_are_left_over_differs_between_epochs",),
    ),
    Mutant(
        "core/groups.py",
        "-(-num_groups * worker // num_workers)",
        "num_groups // num_workers * worker",
        (
            "core/test_distributed.py"
            "::test_workers_share_all_groups_in_order_and_differ_by_one_at_most",
        ),
    ),
    Mutant(
        "data/stream/persons.py",
        "draw.permutation(images) for _ in",
        "draw.choice(images, len(images)) for _ in",
        ("data/stream/test_persons.py::test_a_batch_has_p_persons_with_k_images_each",),
    ),
    Mutant(
        "data/stream/ray_data.py",
        "if columns[NUMBER][0] != due:",
        "if columns[NUMBER][0] < due - 1:",
        ("data/stream/test_stream.py::test_a_stream_in_another_order_than_due_is_noticed",),
    ),
    # What MLflow gets, and the registry.
    Mutant(
        "tracking/run_log.py",
        "if step > self._newest.get(name, -1)",
        "if step >= 0",
        ("tracking/test_tracking.py::test_a_step_that_is_repeated_is_logged_once",),
    ),
    Mutant(
        "tracking/run_log.py",
        "return int(text) if text.isdigit() else 0",
        "return 0",
        ("tracking/test_tracking.py::test_what_was_delivered_is_not_delivered_again",),
    ),
    Mutant(
        "tracking/registry.py",
        'if new.tags.get("evaluation") != champion.tags.get("evaluation"):',
        'if new.tags.get("evaluation") is None:',
        (
            "tracking/test_tracking.py"
            "::test_the_champion_changes_only_for_a_better_score_on_the_same_set",
        ),
    ),
    Mutant(
        "tracking/registry.py",
        "version.run_id == run_id",
        "version.run_id is run_id",
        ("tracking/test_tracking.py::test_a_run_registers_once",),
    ),
    # Runs and sweeps.
    Mutant(
        "train/folder.py",
        "and value != before[setting]",
        "and value is None",
        ("train/test_folder.py::test_a_run_is_continued_with_its_own_settings_alone",),
    ),
    Mutant(
        "train/folder.py",
        "        with FileLock(self.local_path() / LOCK_FILE):\n            self.require_new()",
        "        with FileLock(self.local_path() / LOCK_FILE):",
        ("train/test_folder.py::test_of_jobs_that_begin_a_run_at_the_same_moment_one_wins",),
    ),
    Mutant(
        "train/worker.py",
        "checkpoint=scores or state.step",
        "checkpoint=state.step",
        ("train/test_worker.py::test_what_is_due_depends_on_the_step",),
    ),
    Mutant(
        "train/resources.py",
        "return num_workers * scaling.cpus_per_worker + DECODING_CPUS",
        "return num_workers * scaling.cpus_per_worker",
        (
            "train/test_resources.py"
            "::test_a_run_needs_room_for_each_worker_and_a_cpu_for_decoding",
        ),
    ),
    Mutant(
        "tune/report.py",
        "(not each.has_diverged, each.epochs, each.mean)",
        "(not each.has_diverged, each.mean)",
        ("tune/test_space.py::test_points_rank_by_how_far_they_came_and_then_by_their_mean",),
    ),
    Mutant(
        "tune/points.py",
        "if seed or number in self._earlier:",
        "if seed:",
        ("tune/test_space.py::test_tpe_proposes_again_what_an_earlier_process_tried",),
    ),
    # What only a run on Ray shows: retries, and where a run goes on.
    Mutant(
        "train/worker.py",
        "self.known_checkpoints = {Path(checkpoint.path).name for checkpoint in known}\n"
        "        if self._load_newest(known):",
        "self.known_checkpoints = {Path(checkpoint.path).name for checkpoint in known}\n"
        "        if known and self._load_newest(known[:1]):",
        (
            "train/test_pretrain.py::test_a_resumed_job_continues_from_the_newest_checkpoint_and_says_so",
        ),
    ),
    Mutant(
        "tune/tuner.py",
        "max_failures=plan.base.run.max_failures",
        "max_failures=0",
        (
            "tune/test_sweep.py::test_a_trial_whose_worker_is_killed_goes_on_from_its_checkpoint",
        ),
    ),
    # Workers that are forked.
    Mutant(
        "train/forked_workers.py",
        """import_module("ray.actor").__dict__["ActorClassID"] = _ClassID""",
        "pass",
        ("train/test_forked_workers.py::test_workers_draw_different_ids_of_ray",),
    ),
    Mutant(
        "train/forked_workers.py",
        """is_safe and ("ray" not in sys.modules or _forks_draw_differently())""",
        "is_safe",
        ("train/test_forked_workers.py::test_a_server_in_which_an_id_was_drawn_forks_no_more",),
    ),
]


def main(words: list[str]) -> int:
    """Run the chosen mutants; return 0 if all of them are noticed, 2 if there are none."""
    chosen = [
        mutant
        for mutant in MUTANTS
        if not words or any(word in " ".join([mutant.file, *mutant.tests]) for word in words)
    ]
    if not chosen:
        print(f"No fault has any of these words: {' '.join(words)}")
        return 2
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        copy = Path(place)
        copy_repository(copy)
        named = sorted({test for mutant in chosen for test in mutant.tests})
        status, output = run_tests(copy, named)
        if status != NO_FAILURE:
            print(output)
            print("The named tests must pass before anything is changed.")
            return 1
        unnoticed = [mutant for mutant in chosen if not is_noticed(copy, mutant)]
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} faults are noticed.")
    return 1 if unnoticed else 0


def copy_repository(folder: Path) -> None:
    """Copy all files of the repository that are not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy2(ROOT / name, folder / name)


def mutate(text: str, mutant: Mutant) -> str:
    """Return the text with the fault.

    Raises:
        ValueError: The text that it replaces does not occur once.
    """
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.file}: {mutant.old!r} occurs {text.count(mutant.old)} times; give the "
            "fault in tests/mutants.py the new text"
        )
    return text.replace(mutant.old, mutant.new)


def is_noticed(copy: Path, mutant: Mutant) -> bool:
    """Make the fault in the copy, run its tests, and undo it; say what came of it."""
    file = copy / "upreid_ray" / mutant.file
    text = file.read_text()
    started = time.monotonic()
    file.write_text(mutate(text, mutant))
    try:
        status, output = run_tests(copy, mutant.tests)
    finally:
        file.write_text(text)
    failed = re.findall(r"^(?:FAILED|ERROR) tests/(.*)", output, re.MULTILINE)
    passed = [test for test in mutant.tests if not any(f.startswith(test) for f in failed)]
    noticed = status == SOME_FAILED and not passed
    print(
        f"{'noticed' if noticed else 'NOT NOTICED':<11}  {time.monotonic() - started:5.1f} s  "
        f"{mutant.file}: {' '.join(mutant.new.split())}",
        flush=True,
    )
    if not noticed:
        print(output if status != NO_FAILURE else f"These tests pass: {', '.join(passed)}")
    return noticed


def run_tests(copy: Path, tests: list[str] | tuple[str, ...]) -> tuple[int, str]:
    """Run tests on the copy; return pytest's status and what it prints."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--quiet", "--tb=line", "-p", "no:cacheprovider"),
            *(f"tests/{test}" for test in tests),
        ],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        check=False,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
