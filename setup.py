"""Packages of the wheel: the jobs, beside the package here, become a part of it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["upreid_ray*"]), "upreid_ray.jobs"],
    package_dir={"upreid_ray.jobs": "jobs"},
)
