"""Packaging: sdist -> wheel -> clean folder -> import, as pure Python and with the compiled part."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("build.__main__")  # ``build`` alone could be the folder of that name

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX", "c++").split()[0]
CAN_COMPILE = shutil.which(COMPILER) and Path(sysconfig.get_path("include"), "Python.h").exists()
# The finder of an editable install would provide its own _C to the package under test: it is removed.
PROBE = """
import json, importlib.resources, sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
from toolx_kernels.ops import library
print(json.dumps({
    "file": library.__file__,
    "error": library.compiled_error,
    "kv_write": library.backends()["kv_write"]["CPU"],
    "configs": [f.name for f in importlib.resources.files("toolx_kernels").joinpath("configs").iterdir()],
    "typed": importlib.resources.files("toolx_kernels").joinpath("py.typed").is_file(),
}))
"""


def run(*command, cwd, build_ext=None, check=True, **env):
    environment = {name: value for name, value in os.environ.items() if name != "TOOLX_BUILD_EXT"} | env
    if build_ext is not None:
        environment["TOOLX_BUILD_EXT"] = build_ext
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def build_wheel(source, folder, build_ext=None, check=True, **env):
    """Builds a wheel from a copy of the unpacked sdist, so that builds do not see each other's files.

    Calls only the hook that builds; each hook that pip and build call before it would import torch again.
    """
    copy = shutil.copytree(source, folder / "source")
    hook = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    result = run("-c", hook, folder / "dist", cwd=copy, build_ext=build_ext, check=check, **env)
    return result, list((folder / "dist").glob("*.whl"))


def install_and_probe(wheel, folder):
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", folder / "site", wheel, cwd=folder)
    probed = json.loads(run("-c", PROBE, cwd=folder, PYTHONPATH=str(folder / "site")).stdout.splitlines()[-1])
    assert Path(probed["file"]).is_relative_to(folder / "site")
    installed = folder / "site/toolx_kernels"
    assert relative_paths(installed, "*.py") == relative_paths(ROOT / "toolx_kernels", "*.py")
    assert sorted(probed["configs"]) == sorted(file.name for file in (ROOT / "toolx_kernels/configs").iterdir())
    assert probed["typed"]
    return probed


def relative_paths(folder, pattern):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob(pattern))


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory):
    """The sdist of this source tree, built in a copy and without the extension, then unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    (folder / "source").mkdir()
    for name in ("csrc", "toolx_kernels"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, folder / "source")
    run("-m", "build", "--sdist", "--no-isolation", "--outdir", folder, folder / "source", cwd=folder, build_ext="0")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        # Python warns without a filter since 3.11.4; older versions have no filters
        tar.extractall(folder / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def test_sdist_carries_every_source_and_header(unpacked_sdist):
    for folder, patterns in {"csrc": ("*.cpp", "*.cu", "*.h"), "toolx_kernels": ("*.py", "*.yaml")}.items():
        for pattern in patterns:
            for file in (ROOT / folder).rglob(pattern):
                assert (unpacked_sdist / file.relative_to(ROOT)).exists(), file
    assert (unpacked_sdist / "csrc/checks.h").exists()
    assert (unpacked_sdist / "LICENSE").exists()
    # Every setuptools reads this form; a license expression in pyproject.toml fails in versions before 77.
    assert "\nLicense: Apache-2.0\n" in (unpacked_sdist / "PKG-INFO").read_text()


def test_pure_wheel_installs_and_imports(unpacked_sdist, tmp_path):
    result, (wheel,) = build_wheel(unpacked_sdist, tmp_path, build_ext="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "toolx_kernels: installing as pure Python, because TOOLX_BUILD_EXT=0" in result.stdout
    probed = install_and_probe(wheel, tmp_path)
    assert probed["error"] == "it was not built when the package was installed"
    assert probed["kv_write"] == "plain torch"


@pytest.mark.soak  # repeats the compilation of the setup
@pytest.mark.skipif(not CAN_COMPILE, reason="no C++ compiler or no Python.h on this machine")
def test_compiled_wheel_installs_and_imports(unpacked_sdist, tmp_path):
    _, (wheel,) = build_wheel(unpacked_sdist, tmp_path, build_ext="1")
    assert "-cp310-abi3-" in wheel.name
    probed = install_and_probe(wheel, tmp_path)
    assert probed["error"] is None
    assert probed["kv_write"] == "compiled C++"


def test_a_build_that_cannot_compile_falls_back_unless_required(unpacked_sdist, tmp_path):
    for build_ext in (None, "1"):
        folder = tmp_path / str(build_ext)
        folder.mkdir()
        result, wheels = build_wheel(unpacked_sdist, folder, build_ext=build_ext, check=False, CXX="false")
        printed = result.stdout + result.stderr
        if build_ext is None:
            assert result.returncode == 0 and len(wheels) == 1, printed
            assert "installing as pure Python, without the compiled extension: " in printed
        else:
            assert result.returncode != 0 and not wheels
            assert "TOOLX_BUILD_EXT=1, but the extension cannot be built: " in printed


def test_a_build_without_torch_is_pure_python_and_says_how_to_get_more(unpacked_sdist, tmp_path):
    """As in an isolated build. A folder that shadows torch simulates its absence."""
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow/torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    result, (wheel,) = build_wheel(unpacked_sdist, tmp_path, PYTHONPATH=str(tmp_path / "shadow"))
    assert wheel.name.endswith("-py3-none-any.whl")
    (line,) = {line for line in result.stdout.splitlines() if "pure Python" in line}
    assert "No module named 'torch'" in line and "--no-build-isolation" in line
