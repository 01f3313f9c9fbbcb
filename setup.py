"""All but the list of packages is in pyproject.toml.

In the wheel the three folders of configs lie in the package, in semaim/installed, beside each other as in the
repository: an installed suite finds them by the same names (`semaim.places`), and they find each other.
"""

from setuptools import find_namespace_packages, setup

CONFIGS = ("mmdet_configs", "mmseg_configs", "semaim.configs")

found = find_namespace_packages(include=["semaim", "semaim.*", *CONFIGS, *(f"{name}.*" for name in CONFIGS)])
configs = [name for name in found if name.startswith(CONFIGS)]
setup(
    packages=[*(name for name in found if name not in configs), *(f"semaim.installed.{name}" for name in configs)],
    package_dir={"semaim.installed": "."},
)
