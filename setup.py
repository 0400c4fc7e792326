"""Adds to a wheel what a checkout has beside the package: recipes, their configs and the data.

They go to `posttrain/_shipped` (posttrain/run/shipped.py). An editable install has no copies: it
reads the checkout's own.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("data", "recipes", "accelerate_configs")


class BuildWithShippedFiles(build_py):
    """Copies FOLDERS into the built package."""

    def run(self) -> None:
        """Build the package, and then add the folders."""
        super().run()
        if self.editable_mode:
            return
        for name in FOLDERS:
            target = Path(self.build_lib, "posttrain", "_shipped", name)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(name, target, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithShippedFiles})
