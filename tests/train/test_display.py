"""What a job shows on a terminal and in a log."""

import io
import logging
import re
import sys

import pytest
from rich.console import Console

from upreid_ray.train.display import stage, training_line, training_progress

STEP = "step 12/222  loss 5.379  21 images/s  waiting for data 0.3%  3:18 left"


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)


def test_on_a_terminal_a_step_is_one_live_line_and_all_else_stays_above_it(terminal):
    said = "step 0/222  retrieval  mAP 0.1686  rank-1 0.1333"
    trouble = "Traceback [red](most recent call last):"

    with training_progress(terminal, "starting 1 worker") as stream:
        for text in (said + "\n", trouble[:9], trouble[9:] + "\n", STEP + "\n"):
            stream.write(text)

    shown = terminal.file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r", "\n")
    whole_lines = [line.rstrip() for line in plain.split("\n")]
    assert said in whole_lines
    assert trouble in whole_lines
    assert STEP not in shown
    assert "12/222  loss 5.379  21 images/s" in shown
    assert "3:18 left" in shown


def test_a_terminal_shows_what_happens_before_the_first_step(terminal):
    with training_progress(terminal, "starting 1 worker"):
        pass

    assert "starting 1 worker" in terminal.file.getvalue()


@pytest.mark.parametrize("shown", [stage, training_line])
def test_a_log_gets_a_plain_line_and_keeps_standard_error(shown, caplog):
    before = sys.stderr

    with caplog.at_level(logging.INFO, "upreid_ray"), shown("starting Ray"):
        assert sys.stderr is before

    assert caplog.messages == ["starting Ray"]
