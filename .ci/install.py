"""Installs the project and what it needs into the environment that tox's environments share, if anything has changed.

pip takes more than ten seconds to find that it has nothing to do.
"""

import subprocess
import sys
import venv
from pathlib import Path

CONSTRAINTS = "constraints.txt"


def main(directory: Path, requirement: str) -> None:
    """Makes the environment, or leaves it if it was made from the same.

    Args:
        directory: Where the environment is.
        requirement: What pip installs as editable.
    """
    inputs = [Path(file).read_text(encoding="utf-8") for file in ("pyproject.toml", CONSTRAINTS)]
    made_from = "\n".join([sys.version, sys.base_prefix, str(Path.cwd()), requirement, *inputs])
    record = directory / "made-from"
    if record.is_file() and record.read_text(encoding="utf-8") == made_from:
        return
    record.unlink(missing_ok=True)
    venv.create(directory, symlinks=True, with_pip=True)
    pip = [directory / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Most modules are never imported, and compiling all of them takes as long as to install them.
    subprocess.run([*pip, "--no-compile", "--constraint", CONSTRAINTS, "--editable", requirement], check=True)
    record.write_text(made_from, encoding="utf-8")  # last: an installation that was interrupted is made anew


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
