"""The emoji of the first demo world, by npm package: Noto from emoji-datasource-google, Twemoji from emoji-datasource-twitter."""

import tarfile

from ..recipes import sprites

PACKAGES = {
    "noto": sprites.Package(
        "emoji-datasource-google",
        "16.0.0",
        "img/google/64",
        ".png",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "twemoji": sprites.Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "img/twitter/64",
        ".png",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
}


def folder(style):
    """Where the package of a style is unpacked; the file ``complete`` in it is written last."""
    return PACKAGES[style].tarball.with_suffix("")


def pictures(style):
    """The folder with the 64x64 PNGs of a style; downloads (60 MB) at the first call."""
    package, target = PACKAGES[style], folder(style)
    if not (target / "complete").exists():
        with tarfile.open(sprites.tarball(package)) as archive:
            for member in archive:
                name = member.name.removeprefix("package/")
                wanted = name.startswith(package.folder) or name in ("emoji.json", "LICENSE", "package.json")
                if member.isfile() and wanted:
                    path = target / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.extractfile(member).read())
        (target / "complete").touch()
    return target / package.folder
