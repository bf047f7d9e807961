import sys

from petals_tune.model.packaged import installed_file


def test_a_file_of_an_installed_package_is_found_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / "packaged_for_this_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('it is imported')")
    (package / "weights.bin").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_file(package.name, "weights.bin") == package / "weights.bin"
    assert installed_file(package.name, "other.bin") is None
    assert installed_file("no_such_package", "weights.bin") is None
    assert package.name not in sys.modules
