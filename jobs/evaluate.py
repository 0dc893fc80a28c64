"""Score a frozen backbone by retrieval on a labelled set.

Examples:
  python jobs/evaluate.py --init models:/upreid-resnet50@champion --data.root market1501
  python jobs/evaluate.py --init moco.pth.tar --data.root market1501 --rerank true
  python jobs/evaluate.py --init random --backbone resnet18 --data.height 64 --data.width 32
"""

import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from upreid_ray.command_line import (
    JobParser,
    add_settings,
    check_source,
    connect_to_ray,
    override,
    run_job,
)
from upreid_ray.config.downstream import EvaluateConfig


def main() -> dict[str, Any]:
    """Run the job; return the content of its JSON line."""
    parser = JobParser(__doc__, "--init INIT [--SETTING VALUE ...]")
    add_settings(parser, EvaluateConfig)
    arguments = parser.parse(sys.argv[1:])
    config = override(EvaluateConfig(), arguments)
    check_source("--data.root", config.data.root)
    connect_to_ray(meanwhile="upreid_ray.downstream.evaluate")
    # Imported late: it takes seconds, which a mistake or --help should not cost.
    from upreid_ray.downstream.evaluate import evaluate

    result = evaluate(config)
    Console(stderr=True).print(_table(result.init, result.scores))
    return asdict(result)


def _table(init: str, scores: dict[str, float]) -> Table:
    """Return a table of the scores in percent; re-ranked scores have their own row."""
    names = [name for name in scores if not name.endswith("_reranked")]
    table = Table("init", *names)
    for suffix, label in (("", init), ("_reranked", f"{init}, re-ranked")):
        if names[0] + suffix in scores:
            table.add_row(label, *(f"{100 * scores[name + suffix]:.1f}" for name in names))
    return table


if __name__ == "__main__":
    run_job(main)
