"""The `tamis` command: demo, capture, tune, report, bench, info.

Each module has the options of its commands and, beside them, what runs. Only that imports the rest of tamis, so that
help comes at once and a command needs no package but its own.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from tamis.cli import bench, capture, demo, info, tune
from tamis.cli.usage import UsageError
from tamis.version import installed

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read has seen enough (`tamis info | head`); what is left must not fail when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("tamis: interrupted", file=sys.stderr)
        return INTERRUPTED
    except UsageError as error:
        print(f"tamis: {error}", file=sys.stderr)
        return USAGE
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "tamis":
            raise
        print(f"tamis: {error.name} is not installed: {_how_to_install(error.name)}", file=sys.stderr)
        return FAILED
    except (ValueError, RuntimeError, OSError) as error:
        print(f"tamis: {error}", file=sys.stderr)
        return FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tamis", description="Sparse, quantised attention that reports what it cost.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo.add(commands)
    capture.add(commands)
    tune.add(commands)
    bench.add(commands)
    info.add(commands)
    parser.add_argument("--version", action="version", version=f"tamis {installed() or '(not installed)'}")
    return parser


def _how_to_install(module: str) -> str:
    from tamis.backends.triton import chips

    return chips.how_to_install() if module.split(".")[0] == "triton" else "pip install 'tamis[demo]'"
