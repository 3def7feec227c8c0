"""The command line: `truestep COMMAND …`, or `python -m truestep COMMAND …` under a launcher.

Commands are entry points of the group `truestep.commands`. They live in the packages that they belong to, so that
the callbacks depend on none of them.
"""

import argparse
import sys
from importlib.metadata import EntryPoint, entry_points, version


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command's name and its arguments; those of the process by default.

    Returns:
        The command's exit status; 2 where a package that the command needs is not installed.
    """
    commands = {entry.name: entry for entry in entry_points(group="truestep.commands")}
    parser = argparse.ArgumentParser(prog="truestep", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--version", action="version", version=f"truestep {version('truestep')}")
    parser.add_argument("command", choices=sorted(commands), help="what to do; 'truestep COMMAND --help' says more")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    return _run(commands[parsed.command], parsed.arguments)


def _run(command: EntryPoint, arguments: list[str]) -> int:
    try:
        function = command.load()
    except ModuleNotFoundError as error:
        print(
            f"truestep {command.name}: the module {error.name!r} is missing; "
            f"install the extra: python -m pip install 'truestep[{command.name}]'",
            file=sys.stderr,
        )
        return 2
    status: int = function(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
