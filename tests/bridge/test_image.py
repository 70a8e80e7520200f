"""Which system image Julia starts from; nothing here starts it."""

import os

from pyjlode.bridge import runtime


def test_an_image_is_used_until_its_packages_change(tmp_path, caplog):
    assert runtime.image(str(tmp_path)) is None
    image, manifest = tmp_path / runtime.IMAGE, tmp_path / "Manifest.toml"
    image.write_bytes(b"")
    manifest.write_text("")
    os.utime(manifest, (0, 0))
    assert runtime.image(str(tmp_path)) == str(image)
    newer = image.stat().st_mtime + 10
    os.utime(manifest, (newer, newer))
    assert runtime.image(str(tmp_path)) is None
    assert "setup --sysimage" in caplog.text


def test_the_sources_that_an_image_is_made_of_are_there():
    assert (runtime._SOURCES / "Project.toml").exists()
    assert list(runtime._SOURCES.rglob("*.jl"))
