"""Which CUDA library is missing is told by the loader's own error, from stubs of each; and the real ones do load."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import pytest

from upvits.deploy.machine import doctor
from upvits.deploy.machine.cuda_libraries import Piece, cuda_major, cuda_pieces

# No machine has these versions. That of cuDNN is fixed.
STUBS = {
    "libcudart.so.97": "int cudaRuntimeGetVersion(int *v) { *v = 13020; return 0; }",
    "libcurand.so.97": "int curandGetVersion(int *v) { *v = 10405; return 0; }",
    "libcublasLt.so.97": "int lt(void) { return 0; }",
    "libcublas.so.97": "int blas(void) { return 0; }",
    "libcudnn.so.9": "unsigned long cudnnGetVersion(void) { return 92600; }",
}
NAMES = dict(zip(STUBS, ("CUDA runtime", "cuRAND", "cuBLASLt", "cuBLAS", "cuDNN"), strict=True))
MEND = "pip install 'onnxruntime-gpu[cuda,cudnn]==9.9'"


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("cc")
    if found is None:
        pytest.skip("no C compiler")
    return found


def driver_in(folder: Path, compiler: str) -> None:
    source = Path(__file__).with_name("stub_libcuda.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", source], check=True
    )


@pytest.fixture(scope="module")
def whole(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stubs of all libraries, the driver's too, and a provider that needs them."""
    folder = tmp_path_factory.mktemp("libraries")
    for name, code in STUBS.items():
        link(compiler, folder / name, code)
    driver_in(folder, compiler)
    link(compiler, folder / "libonnxruntime_providers_shared.so", "int shared(void) { return 0; }")
    # an older runtime is named in the file, but not needed
    code = 'const char *older = "libcudart.so.12"; int provider(void) { return 0; }'
    needed = [folder / name for name in (*STUBS, "libcuda.so.1") if "cudnn" not in name]
    link(compiler, folder / "libonnxruntime_providers_cuda.so", code, *needed)
    return folder


def link(compiler: str, path: Path, code: str, *needed: Path) -> None:
    command: list[str | Path] = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-Wl,--no-as-needed"]
    command += ["-x", "c", "-", "-o", path, "-x", "none", *needed]
    subprocess.run(command, input=code, text=True, check=True)


def asked(folder: Path, **environment: str) -> Any:
    """What is said in a process of its own: a library that was loaded once is found for good."""
    code = (
        "import json, sys; from pathlib import Path; from dataclasses import asdict\n"
        "from upvits.deploy.machine.cuda_libraries import cuda_pieces, missing_cuda\n"
        "provider = Path(sys.argv[1]) / 'libonnxruntime_providers_cuda.so'\n"
        "print(json.dumps([[asdict(p) for p in cuda_pieces(provider)], missing_cuda(provider, '9.9')]))"
    )
    root = Path(__file__).resolve().parents[3]
    here = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(root), "STUB_CUDA": "97000", **environment}
    done = subprocess.run([sys.executable, "-c", code, folder], env=here, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_what_is_needed_is_found_in_its_versions(whole: Path) -> None:
    pieces, missing = asked(whole)
    found = {piece["name"]: (piece["library"], piece["version"], piece["trouble"]) for piece in pieces}
    assert found == {
        "CUDA runtime": ("libcudart.so.97", "13.2", ""), "cuRAND": ("libcurand.so.97", "10.4.5", ""),
        "cuBLASLt": ("libcublasLt.so.97", "", ""), "cuBLAS": ("libcublas.so.97", "", ""),
        "cuDNN": ("libcudnn.so.9", "9.26.0", ""),
    }  # fmt: skip
    assert missing is None
    assert cuda_major(whole / "libonnxruntime_providers_cuda.so") == 97
    assert cuda_pieces(whole / "no such file") == ()
    assert cuda_major(whole / "no such file") is None


@pytest.mark.parametrize("library", STUBS)
def test_a_library_that_is_missing_is_named_with_the_command_that_brings_it(
    library: str, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "some"
    shutil.copytree(whole, folder, ignore=lambda place, names: [library])
    if library == "libcudnn.so.9" and find_library("cudnn"):
        pytest.skip("this machine has a cuDNN of its own")
    pieces, (why, fix) = asked(folder)
    assert f"{NAMES[library]}: {library}: cannot open shared object file" in why
    assert why.count("cannot open") == 1
    assert fix == MEND
    assert [piece["library"] for piece in pieces if piece["trouble"]] == [library]


def test_the_driver_is_told_from_the_packages(whole: Path, tmp_path: Path) -> None:
    _, (why, fix) = asked(whole, STUB_CUDA="12040")
    assert why == "onnxruntime-gpu 9.9 is built for CUDA 97, the driver serves CUDA 12.4."
    assert fix == "Update NVIDIA's driver to one for CUDA 97."
    folder = tmp_path / "some"
    shutil.copytree(whole, folder, ignore=lambda place, names: ["libcuda.so.1"])
    _, (why, fix) = asked(folder)
    assert why == "No NVIDIA driver was found: libcuda.so.1 cannot be loaded."
    assert "pip" not in fix


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_the_real_provider_loads_after_a_plain_install_and_only_the_driver_refuses(
    compiler: str, tmp_path: Path
) -> None:
    onnxruntime = importlib.util.find_spec("onnxruntime")
    assert onnxruntime is not None
    assert onnxruntime.origin is not None
    if not (Path(onnxruntime.origin).parent / "capi" / "libonnxruntime_providers_cuda.so").is_file():
        pytest.skip("this is a build of onnxruntime for CPUs")
    driver_in(tmp_path, compiler)
    code = (
        "from upvits.deploy.runtimes import onnxruntime_ as o, onnxruntime_session as s\n"
        "print(s.missing_libraries())\n"
        "o.missing_gpu = lambda: None\n"  # as on a machine whose driver lost its GPU
        "missing = o.CUDA.missing_to_build()\n"
        "print(missing.why); print(missing.fix)"
    )
    root = Path(__file__).resolve().parents[3]
    here = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(root), "STUB_GPUS": ""}
    done = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True, check=True)
    libraries, why, fix = done.stdout.splitlines()
    assert libraries == "None"
    assert (
        why
        == "The provider's libraries load, but the driver refuses. CUDA error 100: no CUDA-capable device is detected."
    )
    assert "nvidia-smi" in fix
    assert "Failed to load" not in done.stderr + done.stdout


def state(trouble: str = "", missing: tuple[str, str] | None = None) -> str:
    pieces = [
        {"name": "cuRAND", "library": "libcurand.so.10", "version": "" if trouble else "10.4.5", "trouble": trouble}
    ]
    assert set(pieces[0]) == set(Piece.__dataclass_fields__)
    return json.dumps({"pieces": pieces, "missing": missing})


@pytest.mark.parametrize(
    ("driver", "said", "status", "found"),
    [
        ("Imaginary GPU, 599.1", state(), "ok", "cuRAND 10.4.5"),
        ("Imaginary GPU, 599.1", state("cannot open", ("why", MEND)), "problem", "no cuRAND (libcurand.so.10)"),
        ("Imaginary GPU, 450.1", state(missing=("is built for CUDA 13", "Update")), "problem", "is built for CUDA 13"),
        (None, state("cannot open", ("why", MEND)), "missing", "no GPU driver: models run on the CPU; no cuRAND"),
    ],
)
def test_doctor_says_what_is_there_and_the_one_command(
    driver: str | None, said: str, status: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    monkeypatch.setattr(doctor, "_python_process", lambda code, *_: (f"noise\n{said}\n", ""))
    check = doctor._onnxruntime_on_cuda()
    assert check.status == status
    assert check.found.startswith(found)
    assert (MEND in check.fix) == (MEND in said)
    assert (check.fix == "") == (status == "ok")
