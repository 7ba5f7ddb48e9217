"""Make it run: export, precision, engines, runtimes, measurements, report; the pipeline and the command line.

from upvits.deploy import build
report = build({"model": "pvtv2_b0", "plan": {"ratio": 0.5}})
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# onnxruntime reports its use unless told otherwise before it is imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from upvits.deploy.pipeline import build

__all__ = ["build"]


def __getattr__(name: str) -> object:
    # torch takes seconds to import; `upvits-deploy --help` should not wait for it
    if name == "build":
        from upvits.deploy.pipeline import build

        return build
    raise AttributeError(f"module 'deploy' has no attribute {name!r}")
