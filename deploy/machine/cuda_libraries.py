"""The CUDA libraries that ONNX Runtime's GPU providers load: whether they are there, and which versions.

Nothing here imports onnxruntime; who asks has it preload what came with pip first (`preload_cuda`).
"""

import ctypes
import mmap
import re
from dataclasses import dataclass
from pathlib import Path

from upvits.deploy.machine.gpu import driver_cuda, driver_problem

# By a name's beginning: what it is, and the call that tells its version.
_KINDS = {
    "libcudart": ("CUDA runtime", "cudaRuntimeGetVersion"),
    "libcurand": ("cuRAND", "curandGetVersion"),
    "libcublasLt": ("cuBLASLt", None),
    "libcublas": ("cuBLAS", None),
    "libcudnn": ("cuDNN", "cudnnGetVersion"),
}
# Of all onnxruntime-gpu since 1.19. It is loaded at the first convolution: the provider does not list it.
_CUDNN = "libcudnn.so.9"


@dataclass(frozen=True, slots=True)
class Piece:
    """A library that a provider needs.

    Attributes:
        name: what it is, for example "cuRAND".
        library: name of its file.
        version: as the library tells it; "" where it does not.
        trouble: what the loader said, where it does not load; "" otherwise.
    """

    name: str
    library: str
    version: str = ""
    trouble: str = ""


def cuda_pieces(provider: Path) -> tuple[Piece, ...]:
    """Every CUDA library that a provider lists as needed, and cuDNN, loaded here; nothing where it has no such file.

    Args:
        provider: shared library of a GPU provider in the onnxruntime package.
    """
    return tuple(_piece(library) for library in (*_named(provider), _CUDNN)) if provider.is_file() else ()


def missing_cuda(provider: Path, installed: str) -> tuple[str, str] | None:
    """Why the libraries of a provider do not load here, and what mends it; None when all do.

    Args:
        provider: as in `cuda_pieces`.
        installed: version of onnxruntime-gpu.
    """
    troubled = [piece for piece in cuda_pieces(provider) if piece.trouble]
    if troubled:
        said = "; ".join(f"{piece.name}: {piece.trouble}" for piece in troubled)
        return f"onnxruntime-gpu {installed} does not find its CUDA libraries. {said}.", mend(installed)
    wanted, served = cuda_major(provider), driver_cuda()
    if wanted is not None and served is not None and served[0] < wanted:
        why = f"onnxruntime-gpu {installed} is built for CUDA {wanted}, the driver serves CUDA {served[0]}.{served[1]}."
        return why, f"Update NVIDIA's driver to one for CUDA {wanted}."
    try:
        ctypes.CDLL(str(provider.with_name("libonnxruntime_providers_shared.so")), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(provider))
    except OSError as error:
        problem = driver_problem() if "libcuda.so" in str(error) else None
        if problem is not None:
            return problem, "Install NVIDIA's driver, or run on the CPU."
        return f"onnxruntime-gpu {installed} does not load its provider: {error}.", mend(installed)
    return None


def mend(installed: str) -> str:
    """The command that brings every library that this onnxruntime-gpu wants, in the versions that it wants."""
    return f"pip install 'onnxruntime-gpu[cuda,cudnn]=={installed}'"


def cuda_major(provider: Path) -> int | None:
    """The CUDA that a provider was built for; None where its file does not tell."""
    runtime = next((name for name in _named(provider) if name.startswith("libcudart.so.")), None)
    return None if runtime is None else int(runtime.rpartition(".")[2])


def _named(provider: Path) -> tuple[str, ...]:
    """CUDA libraries that an ELF file lists as needed, in a fixed order.

    Their names stand side by side in its table of strings. Elsewhere in the file others may stand, such as those of an
    older CUDA that is asked for when it is there.
    """
    if not provider.is_file() or not provider.stat().st_size:
        return ()
    kinds = "|".join(sorted(_KINDS, key=len, reverse=True)).encode()
    with provider.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = {name.decode() for name in re.findall(rb"\0((?:" + kinds + rb")\.so\.\d+)(?=\0)", content)}
    newest: dict[str, str] = {}
    for name in sorted(found, key=lambda name: int(name.rpartition(".")[2])):
        newest[name.partition(".")[0]] = name
    return tuple(newest[kind] for kind in _KINDS if kind in newest and newest[kind] != _CUDNN)


def _piece(library: str) -> Piece:
    name, ask = _KINDS[library.partition(".")[0]]
    try:
        loaded = ctypes.CDLL(library)
    except OSError as error:
        return Piece(name, library, trouble=str(error))
    return Piece(name, library, version=_version(loaded, ask) if ask is not None else "")


def _version(loaded: ctypes.CDLL, ask: str) -> str:
    if not hasattr(loaded, ask):
        return ""
    if ask == "cudnnGetVersion":
        number = getattr(loaded, ask)()
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    answer = ctypes.c_int()
    getattr(loaded, ask)(ctypes.byref(answer))
    number = answer.value  # 13020 is CUDA 13.2, 10400 is cuRAND 10.4.0
    if ask == "curandGetVersion":
        return f"{number // 1000}.{number // 100 % 10}.{number % 100}"
    return f"{number // 1000}.{number % 1000 // 10}"
