"""Files inside installed packages that are read as data and never imported."""

from importlib.util import find_spec
from pathlib import Path


def installed_file(package: str, name: str) -> Path | None:
    """The path of the file `name` in the import package `package`; None where either is absent.

    Nothing of the package runs: some need dependencies that nobody here uses, and only their files are of interest.
    """
    spec = find_spec(package)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return next((path for folder in folders if (path := Path(folder, name)).is_file()), None)
