"""What setup.cfg cannot say: a wheel carries launchers, configurations and the shard builder inside the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Folders of a clone, and the packages they become; mimscale.resources finds them in either place.
CARRIED = {f"mimscale.carried.{folder}": folder for folder in ("launchers", "ds_configs", "shards")}


def readme() -> str:
    """README.md without what only a clone can show: pictures go, links to files of the clone become their text."""
    text = Path(__file__).with_name("README.md").read_text()
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


setup(
    packages=[*find_packages(include=["mimscale", "mimscale.*"]), *CARRIED],
    package_dir=CARRIED,
    long_description=readme(),
)
