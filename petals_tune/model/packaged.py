"""Data files inside installed packages, which are not imported."""

from importlib.util import find_spec
from pathlib import Path


def installed_file(package: str, name: str) -> Path | None:
    """Return the path of the file `name` in the import package `package`; None where either is absent.

    The package is not imported: some need dependencies that this project does not use.
    """
    spec = find_spec(package)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return next((path for folder in folders if (path := Path(folder, name)).is_file()), None)
