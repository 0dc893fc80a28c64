"""What is shown while images are prepared or checked."""

import logging

from upreid_ray.data.shards import progress


def test_a_log_gets_a_line_at_the_start_one_now_and_then_and_one_at_the_end(
    caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "upreid_ray")
    with progress.image_progress("preparing people", 30) as advance:
        advance(1)
        monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
        advance(9)
        monkeypatch.undo()
        advance(10)
        advance(10)

    begun, midway, end = caplog.messages
    assert begun == "preparing people: 30 images"
    assert midway.startswith("preparing people: 10 of 30 images  ")
    assert end.startswith("preparing people: 30 of 30 images  ")
    assert end.endswith("images/s, 0:00 left")
