"""What this machine has, what is missing for which feature, and how to get it.

Nothing is changed and nothing is asked of the network. Whether libraries really load is tried in another process, so
that a broken one cannot take the command down with it.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from upvits.calib_data.installation import install_line
from upvits.deploy.machine.environment import usable_cores
from upvits.deploy.machine.gpu import driver_cuda, driver_problem

Status = Literal["ok", "missing", "problem"]
_SECONDS_TO_LOAD = 180
_DISK_GB, _RAM_GB = 2.0, 4.0  # what the main job on the demo needs at most


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: "ok"; "missing" (optional and not installed); "problem" (installed or required, and not working).
        found: version or size found, or what is wrong.
        serves: the feature that needs it.
        fix: how to get or mend it; empty when ok.
    """

    name: str
    status: Status
    found: str
    serves: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class _Package:
    """A distribution that a feature needs: its name, the code that proves that it works, and how to get it."""

    name: str
    serves: str
    probe: str
    fix: str
    required: bool = False


_CORE_FIX = "Install it again: " + install_line()
_PACKAGES = (
    _Package("torch", "everything", "import torch; torch.ones(2).sum()", _CORE_FIX, required=True),
    _Package(
        "torchvision",
        "image transforms",
        "import torch, torchvision; torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)",
        "Its build must match torch's: install both from one index in one command, "
        "pip install --force-reinstall torch torchvision",
        required=True,
    ),
    _Package("timm", "models", "import timm", _CORE_FIX, required=True),
    _Package("onnx", "export", "import onnx", _CORE_FIX, required=True),
    _Package("onnxscript", "export", "import onnxscript", _CORE_FIX, required=True),
    _Package("onnxslim", "export", "import onnxslim", _CORE_FIX, required=True),
    _Package("onnx-graphsurgeon", "export", "import onnx_graphsurgeon", _CORE_FIX, required=True),
    _Package(
        "tensorrt-rtx",
        "engines for NVIDIA RTX GPUs, built without a GPU too",
        "import tensorrt_rtx",
        install_line("tensorrt-rtx"),
    ),
    _Package(
        "tensorrt",
        "TensorRT engines, built for the GPU of this machine",
        "import tensorrt",
        f"{install_line('tensorrt')} (downloads from NVIDIA's own index, which closed networks refuse)",
    ),
    _Package(
        "openvino",
        "engines for CPUs and Intel GPUs",
        "import openvino",
        install_line("openvino"),
    ),
    _Package(
        "mmdet",
        "detection",
        "from upvits.detection import openmm; openmm.require()",
        install_line("detection"),
    ),
    _Package("nvidia-ml-py", "GPU name, clocks and driver in reports", "import pynvml", "pip install nvidia-ml-py"),
)


def doctor(folder: Path | None = None) -> list[Check]:
    """Look at packages, runtimes, the GPU and the machine; `folder` is where runs would be written (default: here).

    Example:
        >>> torch = next(check for check in doctor() if check.name == "torch")
        >>> torch.status
        'ok'
    """
    checks = [_python(), *_packages(_PACKAGES), *_onnxruntime(), *_gpu(), *_machine(folder or Path.cwd())]
    order: dict[Status, int] = {"problem": 0, "ok": 1, "missing": 2}
    return sorted(checks, key=lambda check: order[check.status])


def render(checks: list[Check]) -> Group:
    """Return what `rich` prints: a table and, below it, what to do; at most 80 columns wide."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold", max_width=26)
    table.add_column("for", overflow="fold", max_width=26)
    colours: dict[Status, str] = {"ok": "green", "missing": "yellow", "problem": "bold red"}
    for check in checks:
        table.add_row(Text(check.status, style=colours[check.status]), check.name, Text(check.found), check.serves)
    parts: list[RenderableType] = [table]
    for title, status in (("Mend", "problem"), ("Add, if you want the feature", "missing")):
        concerned = [check for check in checks if check.status == status and check.fix]
        if concerned:
            parts += [Text(title, style="bold"), *(Text(f"- {c.name}: {c.fix}") for c in concerned), Text("")]
    if not any(check.status == "problem" for check in checks):
        parts.append(Text("The main job can run here.", style="green"))
    return Group(*parts)


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= sys.version_info < (3, 14):
        return Check("Python", "ok", version, "everything")
    return Check("Python", "problem", version, "everything", "Use Python 3.10, 3.11, 3.12 or 3.13.")


def _packages(packages: Sequence[_Package]) -> Iterator[Check]:
    present = [package for package in packages if installed(package.name)]
    troubles = _load(present)
    for package in packages:
        version = installed(package.name)
        trouble = troubles.get(package.name)
        if version is None:
            status: Status = "problem" if package.required else "missing"
            yield Check(package.name, status, "not installed", package.serves, package.fix)
        elif trouble:
            yield Check(package.name, "problem", f"{version}, but: {trouble}", package.serves, package.fix)
        else:
            yield Check(package.name, "ok", version, package.serves)


_CUDA_STATE = """
import json
from upvits.deploy.runtimes.onnxruntime_session import cuda_state
print(json.dumps(cuda_state()))
"""
_LOADER = """
import json, sys
for probe in json.loads(sys.argv[1]):
    try:
        exec(probe, {})
        trouble = ""
    except BaseException as error:
        trouble = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    print("\\n" + json.dumps(trouble), flush=True)
"""


def _load(packages: Sequence[_Package]) -> dict[str, str]:
    """Try packages in one process, which imports what they share once; return what is wrong, by name."""
    troubles: dict[str, str] = {}
    pending = list(packages)
    while pending:
        output, end = _python_process(_LOADER, json.dumps([package.probe for package in pending]))
        answers = [json.loads(line) for line in output.splitlines() if line.startswith('"')]
        troubles |= {package.name: answer for package, answer in zip(pending, answers, strict=False)}
        # When the process ended early, the package that it was loading is to blame; the others get a new process.
        pending = pending[len(answers) :]
        if pending:
            troubles[pending.pop(0).name] = end
    return troubles


def _onnxruntime() -> Iterator[Check]:
    serves = "running models on CPU, gates, measurements"
    gpu, cpu = installed("onnxruntime-gpu"), installed("onnxruntime")
    if gpu and cpu:
        yield Check(
            "onnxruntime",
            "problem",
            f"both onnxruntime-gpu {gpu} and onnxruntime {cpu}",
            serves,
            "They unpack into one folder and break each other: pip uninstall onnxruntime onnxruntime-gpu, "
            "then pip install onnxruntime-gpu",
        )
        return
    # With its folder half removed by another package it imports and is empty.
    probe = "import onnxruntime; onnxruntime.InferenceSession"
    (check,) = _packages([_Package("onnxruntime" if cpu else "onnxruntime-gpu", serves, probe, _CORE_FIX, True)])
    yield check
    if gpu and check.status == "ok":
        yield _onnxruntime_on_cuda()


def _onnxruntime_on_cuda() -> Check:
    """Whether the GPU build of ONNX Runtime finds its CUDA libraries, and which they are."""
    name, serves, driver = "onnxruntime on CUDA", "running models on NVIDIA GPUs", _driver()
    output, trouble = _python_process(_CUDA_STATE)
    if trouble:
        return Check(name, "problem", f"its libraries cannot be looked at: {trouble}", serves, _CORE_FIX)
    state = json.loads(output.splitlines()[-1])
    there = [f"{piece['name']} {piece['version']}" for piece in state["pieces"] if piece["version"]]
    lost = [f"no {piece['name']} ({piece['library']})" for piece in state["pieces"] if piece["trouble"]]
    found = ", ".join([*lost, *there]) or "no CUDA libraries"
    if state["missing"] is None and driver is not None:
        return Check(name, "ok", found, serves)
    if driver is None:
        return Check(
            name,
            "missing",
            f"no GPU driver: models run on the CPU; {found}",
            serves,
            "Needs an NVIDIA GPU with its driver. The GPU build of ONNX Runtime runs on CPUs just as well."
            + (f" On a machine with one: {state['missing'][1]}" if lost else ""),
        )
    why, fix = state["missing"]
    return Check(name, "problem", found if lost else why, serves, fix)


def _gpu() -> Iterator[Check]:
    serves = "faster fine-tuning, GPU engines measured"
    driver = _driver()
    if driver is None:
        fix = "Install NVIDIA's driver on a machine with a GPU."
        yield Check("NVIDIA driver", "missing", driver_problem() or "no GPU that answers", serves, fix)
        return
    yield Check("NVIDIA driver", "ok", driver, serves)
    output, trouble = _python_process("import torch; print(torch.version.cuda, torch.cuda.is_available())")
    if trouble:  # reported by torch's check
        return
    built, _, works = output.strip().partition(" ")
    if works == "True":
        yield Check("torch on CUDA", "ok", f"built for CUDA {built}", serves)
    elif built == "None":
        yield Check("torch on CUDA", "missing", "CPU build of torch", serves, "Install the CUDA build of torch.")
    else:
        yield Check(
            "torch on CUDA",
            "problem",
            f"built for CUDA {built}, which this driver does not serve",
            serves,
            f"Update the driver to one for CUDA {built}, or install a torch built for an older CUDA.",
        )


def _driver() -> str | None:
    """GPU and driver version as nvidia-smi says, the newest CUDA of a driver without that tool, or None."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        served = driver_cuda()
        return None if served is None else f"for CUDA {served[0]}.{served[1]}"
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_SECONDS_TO_LOAD)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.strip().splitlines()
    return lines[0] if answer.returncode == 0 and lines else None


def _python_process(code: str, *arguments: str) -> tuple[str, str]:
    """Run code in another Python process; return what it printed and, if it failed, how."""
    try:
        # Not from the current folder, where a file of the user's might be called like a library.
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS_TO_LOAD,
            cwd=sys.prefix,
        )
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode(errors="replace"), f"does not load within {_SECONDS_TO_LOAD} s"
    output = result.stdout.decode(errors="replace")
    if result.returncode < 0:
        return output, f"crashes when it is loaded ({signal.Signals(-result.returncode).name})"
    return output, f"ends the process with code {result.returncode}" if result.returncode else ""


def _machine(folder: Path) -> Iterator[Check]:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    enough = free >= _DISK_GB
    yield Check(
        "disk",
        "ok" if enough else "problem",
        f"{free:.0f} GB free",
        "runs",
        "" if enough else f"Free at least {_DISK_GB:g} GB, or choose another disk with --output.",
    )
    ram = psutil.virtual_memory()
    enough = ram.available / 1e9 >= _RAM_GB
    yield Check(
        "memory",
        "ok" if enough else "problem",
        f"{ram.available / 1e9:.0f} of {ram.total / 1e9:.0f} GB available",
        "runs",
        "" if enough else f"Close other programs: the demo may take up to {_RAM_GB:g} GB.",
    )
    yield Check("cores", "ok", f"{usable_cores()} usable", "runs")
