"""The optional parts of the package, as its metadata declares them (``[project.optional-dependencies]`` of pyproject.toml)."""

import importlib.metadata

# Where a package is not imported under its own name.
_PACKAGES = {"cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml", "google": "protobuf", "bs4": "beautifulsoup4"}


def extras():
    """``{extra: names of the packages that it brings on this machine}``; empty where only the sources are here."""
    from packaging.requirements import Requirement  # comes with huggingface-hub

    try:
        lines = importlib.metadata.requires("paddlemix") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {}
    for requirement in map(Requirement, lines):
        marker = str(requirement.marker or "")
        if "extra ==" in marker:
            extra = marker.rpartition("extra == ")[2].strip("\"')")
            if requirement.marker.evaluate({"extra": extra}):
                found.setdefault(extra, []).append(requirement.name)
    return found


def installed(package):
    """Whether a package, named as on PyPI, is installed."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def how_to_install(module, extra=None):
    """What to install where ``module`` is missing: a command.

    Args:
        module: the name that could not be imported, such as ``cv2``.
        extra: the extra to name; by default the smallest that brings it.
    """
    package = _PACKAGES.get(module, module).lower().replace("_", "-")
    brought = extras()
    bringing = [name for name, packages in brought.items() if package in packages]
    extra = extra or min(bringing, key=lambda name: len(brought[name]), default=None)
    return f"pip install 'paddlemix[{extra}]'" if extra else f"pip install {package}"


def missing(error, extra=None):
    """One sentence for a module that was not found.

    Args:
        error: the :class:`ModuleNotFoundError`.
        extra: see :func:`how_to_install`.

    Raises:
        ModuleNotFoundError: it is one of this package's own, which installing mends nothing about.
    """
    module = (error.name or "").split(".")[0]
    if module in ("", __package__):
        raise error
    if module == "paddle":
        return "PaddlePaddle is not installed: pip install 'paddlemix[cpu]'; paddlemix doctor tells what GPU and NPU need"
    return f"{module} is not installed, which this command needs: {how_to_install(module, extra)}"
