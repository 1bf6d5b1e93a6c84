"""Package layout only; everything else is in pyproject.toml.

``kernels/`` is a source root without ``__init__.py``: the importable name is ``fastmim_kernels``, so neither
a checkout nor an installed wheel can shadow the unrelated ``kernels`` package from PyPI.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["fastmim", "fastmim.*"]) + find_packages("kernels"),
    package_dir={"fastmim_kernels": "kernels/fastmim_kernels"},
    package_data={"fastmim": ["py.typed", "report/page.html"], "fastmim_kernels.check": ["issue_slots.json"]},
)
