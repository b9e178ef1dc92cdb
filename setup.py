"""Everything is said in pyproject.toml; here is what it cannot say."""

from pathlib import Path

from setuptools import setup

# Without links the installer would see no package at all and install nothing, and say that all is well.
if not Path(__file__).with_name(".src").joinpath("pipeline", "store").is_dir():
    raise SystemExit(
        "error: symbolic links were checked out as text files; clone again with `git clone -c core.symlinks=true` "
        "(on Windows with Developer Mode on), or install a wheel that was built elsewhere"
    )
setup()
