"""jaxserve.serve on a device that misbehaves: `python -m tests.server.faulty [options]`.

A step fails when the prompt of one of its requests begins with FAILING. It hangs when one begins with HANGING, as long as the file named by
$HANG_FILE exists. Everything else is the real server.
"""

from __future__ import annotations

import os
import pathlib
import time

from jaxserve import serve
from jaxserve.runner.runner import Pending, Runner
from jaxserve.scheduler.schedule import Schedule

FAILING, HANGING = 301, 302


def main() -> None:
    """Serve."""
    dispatch, hang_file = Runner.dispatch, pathlib.Path(os.environ["HANG_FILE"])

    def dispatch_or_not(runner: Runner, schedule: Schedule) -> Pending:
        first = {row.request.prompt_ids[0] for row in schedule.rows}
        if FAILING in first:
            raise RuntimeError("the device is on fire")
        while HANGING in first and hang_file.exists():
            time.sleep(0.01)
        return dispatch(runner, schedule)

    Runner.dispatch = dispatch_or_not  # type: ignore[method-assign]
    serve.main()


if __name__ == "__main__":
    main()
