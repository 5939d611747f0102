"""The command line: `eventrun [--store URL] VERB`. Data goes to stdout, talk to stderr.

Exit codes: 0 ok, 1 not found, false or failed, 2 wrong usage, 130 after Ctrl-C, 141 when the reader of a pipe went.
This module and `verbs` import nothing but argparse, so that help is there at once; each verb's module comes when
the verb is run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from eventrun.cli.verbs import parse

__all__ = ["main"]

INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + the signal's number, as a shell shows it; 130 in `opening` too


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name) and return the exit code."""
    if sys.stdout is None or sys.stderr is None:  # closed by the shell: `eventrun ls >&-`
        return 1
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a name in Chinese must not stop a listing in ASCII
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python would flush stdout once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.stderr.write(f"the output can't be written: {error.strerror or error}\n")
        return 1
    return code


def _run(argv: Sequence[str]) -> int:
    from eventrun.errors import SALVAGE, EventrunError, InvalidValue, LogDamaged

    try:
        arguments = parse(argv)
        return int(arguments.run(arguments))
    except SystemExit as end:  # argparse: help was shown, or the usage was wrong
        return end.code if isinstance(end.code, int) else 2
    except InvalidValue as error:
        return _complain(error, 2)
    except LogDamaged as error:
        code = _complain(error, 1)
        if "salvage" not in str(error):
            print(SALVAGE, file=sys.stderr)
        return code
    except EventrunError as error:
        return _complain(error, 1)


def _complain(error: Exception, code: int) -> int:
    from eventrun.summary import clean

    sys.stdout.flush()
    for line in str(error).splitlines():
        print(clean(line), file=sys.stderr)
    return code
