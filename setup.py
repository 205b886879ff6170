"""The wheel carries what a repository has beside the package: settings, presets, sample, a run's notebook."""
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

DEFAULTS = ("settings.ini", "data/presets", "data/sample", "nbs/7_run/70_run_experiment.ipynb")


class BuildWithDefaults(build_py):
    "Build the package afresh, with `defaults` in it; an editable install reads the repository itself."

    def run(self):
        built = Path(self.build_lib, "worldmodels_nb")
        if not self.editable_mode: shutil.rmtree(built, ignore_errors=True)  # modules of an earlier build
        super().run()
        if not self.editable_mode: self.copy_defaults(built / "defaults")

    def copy_defaults(self, folder):
        for name in DEFAULTS:
            for file in [Path(name), *sorted(Path(name).rglob("*"))]:
                if not file.is_file() or file.name.startswith("."): continue
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, folder / file)


setup(cmdclass={"build_py": BuildWithDefaults})
