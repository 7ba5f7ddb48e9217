"""What a command does not need is not imported, and comes whole where it is needed after all."""

from __future__ import annotations

import subprocess
import sys

from upvits.calib_data import demo_weights

_INSPECT = """
import sys
from upvits.deploy.cli.app import main
sys.argv = ["upvits-deploy", "inspect", {folder!r}, "--json"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
found = {{"torch._dynamo", "sympy", "triton", "onnx", "onnxslim", "mmdet", "datasets"}} & sys.modules.keys()
assert not found, found
"""

_COMPILED = """
import sys
from upvits.deploy.cli.quick import leave_out_compiler
leave_out_compiler()
import timm, torch
from torchvision.ops import roi_align
assert "torch._dynamo" not in sys.modules
boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
assert roi_align(torch.ones(1, 1, 8, 8), boxes, 2).tolist() == [[[[1, 1], [1, 1]]]]
later = torch.compiler.disable(lambda x: x + 1)
assert "torch._dynamo" not in sys.modules
assert later(torch.ones(1)).item() == 2
import torch._dynamo.utils
assert torch.compiler.disable.__module__ == "torch.compiler"
assert sys.modules["torch._dynamo.utils"].counters is torch._dynamo.utils.counters
assert torch.compile(lambda x: later(x) * 2, backend="eager")(torch.ones(1)).item() == 4
assert not [finder for finder in sys.meta_path if "upvits" in type(finder).__module__]
"""


_MODELS = """
import sys
from upvits.deploy.cli.app import main
sys.argv = ["upvits-deploy", "models", "--json"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert not {"torch", "timm"} & sys.modules.keys()
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_inspect_imports_no_compiler_and_no_exporter() -> None:
    run(_INSPECT.format(folder=str(demo_weights("pvt_v2_b0"))))


def test_the_compiler_comes_whole_when_something_wants_it() -> None:
    run(_COMPILED)


def test_models_imports_no_torch() -> None:
    run(_MODELS)
