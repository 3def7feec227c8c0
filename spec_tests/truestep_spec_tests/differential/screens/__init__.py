"""Screens of a training, as text that somebody has looked at, and one of them as a picture.

`python -m truestep_spec_tests.differential.screens` writes them anew.
"""

from pathlib import Path

SCREENS = Path(__file__).parent

WIDTHS = (60, 100, 160)
"""Columns of the terminals."""
