"""The `mentor-serve` command. Thin: it parses, calls the layers below, prints, and sets exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration. Errors are one line; `--debug` shows
the traceback. `--json` prints one JSON document on standard output. Modules of this package import
what they run inside the commands, so that `--help` costs neither torch nor ray.
"""

from mentor_serve.cli.application import app, main

__all__ = ["app", "main"]
