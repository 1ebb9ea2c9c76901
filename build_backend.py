"""setuptools' build backend (PEP 517) with one change: it compiles against the torch that will load the extension.

A C++ extension works only with the torch it was compiled against, so an isolated build that fetches a torch of its
own (2 GB, perhaps of another version) gives an extension that cannot be loaded. pip runs an isolated build with the
interpreter of the target environment, so torch is looked for there first; only where it is not to be found does the
build ask for the version that constraints.txt names.
"""

import importlib.machinery
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (the hooks of PEP 517 and PEP 660)

_SITE = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]


def _target_has_torch() -> bool:
    return importlib.machinery.PathFinder.find_spec("torch", _SITE) is not None


def _torch_requirement() -> list[str]:
    if _target_has_torch():
        return []
    lines = (Path(__file__).parent / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line.startswith(("torch==", "numpy=="))]


def _see_target_environment() -> None:
    # Behind the isolated environment's own folders: its setuptools and ninja stay in front.
    sys.path += [path for path in dict.fromkeys(_SITE) if path not in sys.path]


def get_requires_for_build_wheel(config_settings=None):
    return _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return _torch_requirement()


def get_requires_for_build_sdist(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    _see_target_environment()
    return _setuptools.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    _see_target_environment()
    return _setuptools.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _see_target_environment()
    return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _see_target_environment()
    return _setuptools.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    _see_target_environment()
    return _setuptools.build_sdist(sdist_directory, config_settings)
