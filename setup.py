"""All but the list of packages is in pyproject.toml.

In the wheel the configs of the repository's top level lie in the package, as semaim/mmdet_configs and
semaim/mmseg_configs: an installed suite finds them by the same names (`semaim.places`).
"""

from setuptools import find_namespace_packages, setup

FOLDERS = ("mmdet_configs", "mmseg_configs")

outside = find_namespace_packages(include=[pattern for name in FOLDERS for pattern in (name, f"{name}.*")])
setup(
    packages=[*find_namespace_packages(include=["semaim", "semaim.*"]), *(f"semaim.{name}" for name in outside)],
    package_dir={f"semaim.{name}": name for name in FOLDERS},
)
