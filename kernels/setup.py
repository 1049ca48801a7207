"""The build of ../setup.py: csrc/ lies beside this folder, so this builds from a checkout and not from an sdist of its own."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "setup.py"))
