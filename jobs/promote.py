"""Make a registered version the champion of its model, with a reason.

The alias champion moves by itself only to a version that scores better on the same evaluation
set. This job moves it to any version. Tags of the version record the reason, the time, and the
champion before it.

Example:
  python jobs/promote.py models:/upreid-resnet50/7 --reason "Better on our own cameras."
"""

import logging
import sys
from typing import Any

from upreid_ray.command_line import JobParser, run_job
from upreid_ray.config.errors import InputError

logger = logging.getLogger("upreid_ray")


def main() -> dict[str, Any]:
    """Run the job; return the content of its JSON line."""
    parser = JobParser(__doc__, 'VERSION --reason "TEXT"')
    parser.add_argument(
        "version", metavar="VERSION", help="models:/NAME/VERSION or models:/NAME@ALIAS"
    )
    parser.add_argument("--reason", required=True, metavar="TEXT", help="reason in a sentence")
    arguments = parser.parse(sys.argv[1:])
    if not arguments.reason.strip():
        raise InputError("--reason: must not be empty")
    # Imported late: it takes seconds, which a mistake or --help should not cost.
    from upreid_ray.tracking import connection, registry

    uri, before = registry.promote(connection.connect(), arguments.version, arguments.reason)
    logger.info("%s is the champion; before it was %s", uri, before or "none")
    return {"model_uri": uri, "before": before, "reason": arguments.reason}


if __name__ == "__main__":
    run_job(main)
