"""The house is held up here: who may import whom, what is public, and what an import may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import autobatch

PACKAGE = Path(autobatch.__file__).parent

# Rooms from the ground up; a room may import the ones listed for it, and itself.
MAY_IMPORT = {
    "_version": set(),
    "core": set(),
    "report": {"core"},
    "training": {"core", "devices", "workload"},
    "devices": {"core"},
    "workload": {"core", "examples"},
    "probe": {"core", "devices", "workload", "simulate", "_version"},
    "simulate": {"core", "devices", "workload"},
    "loop": {"core"},
    "cache": {"core", "devices", "workload", "_version"},
    "finder": {"core", "cache", "probe", "loop"},
    "estimator": {"core", "loop", "simulate", "workload"},
    "examples": {"core", ""},
    "": {"core", "workload", "estimator", "finder", "training", "_version"},
    "cli": {"core", "cache", "devices", "estimator", "probe", "simulate", "loop", "report", "_version"},
    "__main__": {"cli"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    above = {"training"} if path.name == "for_training.py" else set()
    rooms = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir()} - {"__init__"}
    seen = set()
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "autobatch":
            seen.add(parts[1] if len(parts) > 1 and parts[1] in rooms else "")
    # "from autobatch.core.x import y" names the package itself only when nothing below it is named.
    if not any(name == "autobatch" for name in imports_of(path)):
        seen.discard("")
    allowed = {room} | MAY_IMPORT[room] | above
    assert seen <= allowed, f"{path.name} may not import {seen - allowed}"


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) == "core"], ids=lambda path: path.name)
def test_core_imports_the_standard_library_alone(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names) - {"autobatch"}
    assert outside == set()


def test_only_nvml_imports_pynvml() -> None:
    assert [p.name for p in MODULES if any(name.split(".")[0] == "pynvml" for name in imports_of(p))] == ["nvml.py"]


def test_only_the_command_line_and_the_examples_print_or_exit() -> None:
    calls = {
        room_of(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.exit", "exit")
    }
    assert calls <= {"cli", "examples"}


def test_no_file_is_too_long_to_read_at_once() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_exported_names_are_sorted_documented_and_importable() -> None:
    assert autobatch.__all__ == sorted(autobatch.__all__)
    for name in autobatch.__all__:
        assert getattr(autobatch, name) is not None
        if name != "__version__":
            assert getattr(autobatch, name).__doc__
    assert set(autobatch.__all__) == {
        "AutobatchError", "BatchPlan", "DeviceUnavailable", "InvalidRequest", "MemoryReading", "NoBatchSizeFits", "NoiseMeter",
        "NoiseScale", "Outcome", "Peak", "Probe", "Ramp", "Scaled", "Setting", "Trying", "WorkerFailed", "Workload", "WorkloadFailed",
        "__version__", "build_workload", "estimate", "find", "noise_scale", "resilient", "search",
    }  # fmt: skip
    with pytest.raises(AttributeError, match="no attribute 'fnid'"):
        autobatch.fnid  # noqa: B018


@pytest.mark.parametrize(
    "command", ["import autobatch", "import autobatch.cli", "import autobatch.finder, autobatch.loop, autobatch.probe.worker"]
)
def test_heavy_packages_are_not_loaded_before_they_are_used(command: str) -> None:
    script = f"{command}\nimport sys\nprint(sorted({{'torch', 'pynvml', 'numpy', 'sklearn'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\nfrom autobatch.cli import main\nmain(sys.argv[1:])"  # None makes any import of it fail
    )
    for command in ([], ["probe"], ["devices"], ["explain"], ["cache", "list"]):
        run = subprocess.run([sys.executable, "-c", script, *command, "--help"], capture_output=True, text=True, check=True)
        assert run.stdout.startswith("Usage: autobatch")
