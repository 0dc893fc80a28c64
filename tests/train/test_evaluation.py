"""Scores during a run."""

from types import SimpleNamespace

import numpy as np

from tests.core.tiny import fresh_state, people
from upreid_ray.train.evaluation import Evaluation


def test_queries_without_a_match_are_counted_and_the_log_says_so_once(monkeypatch, caplog):
    evaluation = Evaluation(None, fresh_state())
    block = {
        "image": people(4).numpy(),
        "decoded": np.ones(4, bool),
        "shard": np.zeros(4, int),
        "pid": np.array([1, 2, 1, 3]),
        "camid": np.array([1, 1, 2, 2]),
        "is_query": np.array([True, True, False, False]),
    }
    images = SimpleNamespace(num_blocks=1, row_groups=None, read=lambda _: dict(block))
    monkeypatch.setattr(evaluation, "_images", images)

    scores = [evaluation.score() for _ in range(2)]

    assert scores[0].keys() == {"mAP", "rank1", "rank5", "rank10", "mINP"}
    assert evaluation.num_queries_without_match == 1
    assert caplog.text.count("1 of 2 query images have no match") == 1
