import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from retour.data import sprites


def pack(path, members):
    """Write a tarball with the given members (name to bytes)."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def emoji(colour, box):
    """A PNG with one rectangle."""
    image = Image.new("RGBA", (72, 72))
    image.paste(colour, box)
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def tarballs(tmp_path):
    labels = [
        {"label": "cat face", "hexcode": "1F431", "group": 3},
        {"label": "red apple", "hexcode": "1F34E-FE0F", "group": 4},
        {"label": "only noto", "hexcode": "1F999", "group": 4},
        {"label": "flag", "hexcode": "1F1F0", "group": 9},
    ]
    name, version, member = sprites.LABELS
    pack(tmp_path / sprites.tarball_name(name, version), {member: json.dumps(labels).encode()})
    for style, (name, version, prefix) in sprites.STYLES.items():
        codes = ["1f431", "1f34e", "1f1f0"] + ["1f999"] * (style == "noto")
        members = {f"{prefix}{c}.png": emoji((200, 30, 30, 255), (10, 20, 50, 40)) for c in codes}
        pack(tmp_path / sprites.tarball_name(name, version), members)
    return tmp_path


def test_concepts_in_all_styles_are_joined_by_code(tarballs, tmp_path):
    rows, images = sprites.collect(tarballs)
    assert {row["label"] for row in rows} == {"cat face", "red apple"}
    assert len(rows) == len(images) == 6
    sprites.save(tmp_path / "cache", rows, images)
    cache = sprites.load(tmp_path / "cache")
    assert cache.concepts == ["apple", "cat"]
    assert cache.groups == {"apple": "food", "cat": "animals"}
    assert all((cache.images["cat", s] == images[0]).all() for s in cache.styles)
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {"sprites.webp", "sprites.json"}


def test_fit_crops_to_the_paint_and_centres_it():
    image = Image.open(io.BytesIO(emoji((200, 30, 30, 255), (10, 20, 50, 40))))
    alpha = sprites.fit(image)[..., 3]
    rows, columns = np.nonzero(alpha > 128)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 47, 0, 63)


def test_scoped_packages_have_flat_tarball_names():
    assert sprites.tarball_name("@a/b-c", "1.2.0") == "a-b-c-1.2.0.tgz"


def test_core_nouns_are_unique_and_told_from_the_rest():
    nouns = sprites.core_nouns()
    assert 200 < len(nouns) == len(set(nouns.values()))
    everything = sprites.nouns_for(["cat", "Ferris wheel", "cat face"], "all")
    assert everything["Ferris wheel"] == "ferris wheel"
    assert "cat" not in everything and everything["cat face"] == "cat"
    with pytest.raises(ValueError, match="'most'"):
        sprites.nouns_for([], "most")
