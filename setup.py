"""Maps the top-level folder ``experiments`` to the package ``gen.experiments``; the rest is pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["gen", "gen.*"]), "gen.experiments"],
    package_dir={"gen.experiments": "experiments"},
    package_data={
        "gen": ["py.typed", "data/*.npz", "data/*.md", "features/*.safetensors", "metrics/*.html", "**/*.jinja"]
    },
)
