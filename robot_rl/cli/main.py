"""The command ``robot-rl``: finds the verb among the entry points and loads nothing else."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from robot_rl.cli.catalog import entries, summary
from robot_rl.core.errors import RobotRLError, UnknownNameError

_ORDER = ("demo", "data", "collect", "train", "eval", "finetune", "compare", "deploy", "list", "doctor")
_HEADER = "From demonstrations to a safe robot that improves itself."
_FOOTER = """\
First steps
  robot-rl doctor                       is everything here that is needed?
  robot-rl demo                         the whole road in ten minutes, ends with a report
  robot-rl <command> --help             every setting of one command, with its default

Every command takes --debug, which shows the traceback of an error (so does ROBOT_RL_DEBUG=1)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status: 0 done, 1 a check failed, 2 a user's error, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("ROBOT_RL_DEBUG", "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview() + "\n")
        return 0
    if arguments[0] in ("-V", "--version"):
        sys.stdout.write(f"robot-rl {_version()}\n")
        return 0
    try:
        return _run_verb(arguments[0], arguments[1:])
    except RobotRLError as error:
        if debug:
            raise
        _complain(str(error))
        return 2
    except OSError as error:
        if debug:
            raise
        _complain(f"{error.strerror or type(error).__name__}: {error.filename or error}")
        return 2
    except KeyboardInterrupt:  # before a verb has begun
        _complain("Interrupted.", colour="33")
        return 130


def overview() -> str:
    """Return the help text: one line per verb, read from the modules' docstrings without importing them."""
    commands = entries("commands")
    ordered = [*(n for n in _ORDER if n in commands), *(n for n in sorted(commands) if n not in _ORDER)]
    width = max(map(len, ordered), default=0)
    lines = [f"  {name:<{width}}  {summary(commands[name])}" for name in ordered]
    return "\n".join([_HEADER, "", "usage: robot-rl <command> [options]", "", "Commands", *lines, "", _FOOTER])


def _run_verb(verb: str, arguments: list[str]) -> int:
    commands = entries("commands")
    if verb not in commands:
        raise UnknownNameError("command", verb, commands)
    module = commands[verb].load()

    import tyro  # after the verb is known, so that the overview does not wait for it

    config = tyro.cli(
        module.Config,
        prog=f"robot-rl {verb}",
        description=(module.__doc__ or "").strip(),
        args=arguments,
    )
    try:
        return int(module.run(config) or 0)
    except KeyboardInterrupt:
        _complain(f"Interrupted. {_how_to_resume(module, config, verb, arguments)}", colour="33")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`robot-rl list | head`); keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _how_to_resume(module: Any, config: Any, verb: str, arguments: list[str]) -> str:
    """A verb may say it itself with ``resume_hint(config) -> str``; a ``resume`` field says that it can."""
    if hasattr(module, "resume_hint"):
        return str(module.resume_hint(config))
    command = shlex.join(["robot-rl", verb, *arguments])
    if hasattr(config, "resume"):
        return f"Continue with: {command}{'' if '--resume' in arguments else ' --resume'}"
    return f"Start again with: {command}"


def command(verb: str, config: Any) -> str:
    """Return the command line of ``config``, without settings that have their defaults."""
    words = ["robot-rl", verb]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        flag = "--" + field.name.replace("_", "-")
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        words += [flag, *map(str, values)]
    return shlex.join(words)


def _complain(text: str, colour: str = "31") -> None:
    line = " ".join(text.split())
    coloured = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    sys.stderr.write(f"\x1b[{colour}m{line}\x1b[0m\n" if coloured else f"{line}\n")


def _version() -> str:
    try:
        return version("robot-rl")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
