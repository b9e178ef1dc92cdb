"""`pipeline` and `python -m pipeline`: the command line as a process of its own."""

from __future__ import annotations

import atexit
import os
import sys


def run() -> None:
    """Runs the command line and ends the process with its status.

    Once all is done that an interpreter does in order (threads joined, exit functions run, output flushed), the process
    ends at once: taking apart module by module what torch and transformers made takes a quarter of a second. Not where
    others have a part in it: modules of the user's, which may leave a file open, or exit functions of before.
    """
    here, status = os.getpid(), None

    def leave() -> None:
        plugins = sys.modules.get("pipeline.extract.plugins")
        if status is None or os.getpid() != here or (plugins is not None and plugins.imported()):
            return
        try:
            for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by who started us
                stream.flush()
        except (OSError, ValueError):
            return  # the interpreter tries again, and says so
        os._exit(status)

    if not atexit._ncallbacks():
        atexit.register(leave)  # before anything else is imported: what is registered first is run last
    from pipeline.cli.main import main

    try:
        main()
    except KeyboardInterrupt:  # while modules were being imported, say; commands say more
        status = 130
        print("stopped", file=sys.stderr)
        sys.exit(status)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            status = end.code or 0
        raise


if __name__ == "__main__":
    run()
