"""Serves a folder that `upvits-deploy package` made: send a picture, get the most likely classes.

    python examples/serve.py runs/pvt_v2_b0-r0.50-package --port 8000
    curl --data-binary @picture.jpg localhost:8000

It needs nothing but onnxruntime, numpy and pillow. It is an example: it listens on this machine only, and has neither
encryption nor users. Put a real server in front of it, or use the Triton repository in the package.
"""

from __future__ import annotations

import argparse
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, UnidentifiedImageError

LARGEST = 20 * 2**20
"""Bytes of a picture that are taken at most."""


class Classifier:
    """The network of a package on ONNX Runtime: in the precision that was best there, else in fp32."""

    def __init__(self, package: Path) -> None:
        self.preprocess = json.loads((package / "preprocess.json").read_text())
        self.labels: list[str] = json.loads((package / "labels.json").read_text())
        about = json.loads((package / "package.json").read_text())
        engines = [engine["file"] for engine in about["engines"] if engine["runtime"] == "onnxruntime"]
        self.session = onnxruntime.InferenceSession(
            package / (engines or [about["onnx"]])[0], providers=["CPUExecutionProvider"]
        )

    def prepare(self, picture: Image.Image) -> np.ndarray[Any, np.dtype[Any]]:
        """A picture as the network takes it: [1, 3, H, W] normalised, or [1, H, W, 3] where it normalises itself."""
        spec = self.preprocess
        size = [int(spec["resize"] * side / min(picture.size)) for side in picture.size]
        picture = picture.convert("RGB").resize((size[0], size[1]), Image.Resampling[spec["interpolation"].upper()])
        left, top = (round((side - spec["size"]) / 2) for side in picture.size)
        picture = picture.crop((left, top, left + spec["size"], top + spec["size"]))
        if spec["dtype"] == "uint8":
            return np.asarray(picture)[None]
        pixels = (np.asarray(picture, np.float32) / 255 - np.float32(spec["mean"])) / np.float32(spec["std"])
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype=np.float32)

    def classify(self, picture: Image.Image, count: int = 5) -> list[dict[str, Any]]:
        """The most likely classes with their probabilities."""
        logits = self.session.run(["logits"], {self.preprocess["input"]: self.prepare(picture)})[0][0]
        odds = np.exp(logits - logits.max())
        best = np.argsort(-odds)[:count]
        return [{"label": self.labels[index], "probability": float(odds[index] / odds.sum())} for index in best]


class Handler(BaseHTTPRequestHandler):
    """Answers POST with JSON."""

    classifier: Classifier

    def do_POST(self) -> None:
        """The body is a picture file."""
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= LARGEST:
            self._answer(413, {"error": f"Send a picture of at most {LARGEST} bytes."})
            return
        try:
            picture = Image.open(io.BytesIO(self.rfile.read(length)))
            self._answer(200, {"classes": self.classifier.classify(picture)})
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            self._answer(400, {"error": f"This is no picture that can be read: {error}"})

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Read the arguments and serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve a folder that `upvits-deploy package` made.")
    parser.add_argument("package", type=Path, help="the folder")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    arguments = parser.parse_args()
    Handler.classifier = Classifier(arguments.package)
    with ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port} takes pictures by POST", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
