"""What `plan` prints of a latency that was met."""

from rich.console import Console

from tests.deploy.conftest import small_model
from upvits.deploy.cli.plan_view import plan_table
from upvits.deploy.speed.search import Attempt, LatencyRecord
from upvits.toolchain import plan, score


def test_milliseconds_stand_below_the_widths() -> None:
    model = small_model("deit_tiny_patch16_224", img_size=32, num_classes=5)
    found = plan(model, score(model, method="random"), ratio=0.5)
    chosen = Attempt(
        budget_ms=1.0, predicted_ms=1.0, dense_ms=4.0, measured_ms=1.96, speedup=2.04, low=1.9, high=2.2,
        over_target=0.98, high_over_target=1.05, macs_share=0.4, floor=False,
    )  # fmt: skip
    record = LatencyRecord(
        asked="2x", runtime="onnxruntime", precision="fp32", batch=8, target_ms=2.0, chosen=chosen, attempts=[chosen],
        points=10, points_spread=0.1,
    )  # fmt: skip
    console = Console(width=80, record=True, quiet=False)
    with console.capture() as shown:
        console.print(plan_table(found, record))
    text = " ".join(shown.get().split())
    assert "timed: 4 ms to 1.96 ms (2.04x, 1.90 to 2.20 over rounds) on onnxruntime fp32, batch 8" in text
    with console.capture() as shown:
        console.print(plan_table(found))
    assert "timed" not in shown.get()
