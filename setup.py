"""Packages are found, not listed; the configuration groups in `conf/` ship as one of them."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["bnnft", "bnnft.*"]), "bnnft.conf"])
