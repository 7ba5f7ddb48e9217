"""What NVIDIA's own Python bindings have: names, signatures and enums, read from the packages themselves.

`make bindings` puts those of TensorRT 10.3 to 11.x into `.bindings/`, where a stub stands in for the library that they
want (5 MB each; the libraries are gigabytes). TensorRT-RTX is read as it is installed.
"""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
VERSIONS = tuple(line.split()[0] for line in Path(__file__).with_name("bindings.txt").read_text().splitlines())
RTX = "rtx"


@functools.cache
def surface(version: str) -> dict[str, Any]:
    """Classes with their methods (each a list of signatures) and properties, enums with their numbers, functions.

    A parameter that may be left out ends in "=". Skips where the bindings are not there.
    """
    if version == RTX:
        pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
        return _read("tensorrt_rtx")
    folder = ROOT / ".bindings" / version
    if not folder.is_dir():
        pytest.skip(f"the bindings of TensorRT {version} are not there: make bindings")
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler, which makes a stub of TensorRT")
    with TemporaryDirectory() as stubs:
        major = version.split(".")[0]
        for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
            library = f"lib{name}.so.{major}"
            source = Path(__file__).with_name("stub_nvinfer.c")
            subprocess.run(
                [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", f"{stubs}/{library}", source], check=True
            )
        return _read("tensorrt_bindings", LD_LIBRARY_PATH=stubs, PYTHONPATH=str(folder))


def _read(module: str, **environment: str) -> dict[str, Any]:
    """In a process of its own: several versions have one name, and none can be unloaded."""
    command = [sys.executable, "-W", "ignore", "-c", _READER, module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


_READER = r"""
import importlib, inspect, json, re, sys
trt = importlib.import_module(sys.argv[1])

def parts(text):
    depth, start = 0, 0
    for index, sign in enumerate(text):
        depth += (sign in "([<{") - (sign in ")]}" or sign == ">" and text[index - 1] != "-")
        if sign == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    yield text[start:]

def signatures(name, thing):
    found = re.findall(rf"^(?:\d+\. )?{name}\((.*)\) -> ", thing.__doc__ or "", re.MULTILINE)
    listed = [
        [re.match(r"\s*(\w+)", part)[1] + "=" * (" = " in part) for part in parts(text) if part.strip()]
        for text in found if text != "*args, **kwargs"
    ]
    if listed or not inspect.isfunction(thing):
        return listed
    return [[p.name + "=" * (p.default is not p.empty) for p in inspect.signature(thing).parameters.values()]]

classes, enums, functions = {}, {}, {}
def add(name, thing):
    if hasattr(thing, "__members__"):
        enums[name] = {member: int(value) for member, value in thing.__members__.items()}
        return
    methods, properties = {}, []
    for member, value in inspect.getmembers(thing):
        if isinstance(value, property):
            properties.append(member)
        elif isinstance(value, type) and hasattr(value, "__members__"):
            add(f"{name}.{member}", value)
        elif callable(value) and (member == "__init__" or not member.startswith("_")):
            methods[member] = signatures(member, value)
    classes[name] = {"methods": methods, "properties": properties}

for name, thing in vars(trt).items():
    if isinstance(thing, type) and not name.startswith("_"):
        add(name, thing)
    elif inspect.isroutine(thing) and not name.startswith("_"):
        functions[name] = signatures(name, thing)
print(json.dumps({"version": trt.__version__, "classes": classes, "enums": enums, "functions": functions}))
"""
