"""Values that may be chosen by name. Importing this is quick: the recipe reads it before torch is loaded."""

from typing import Literal

Order = Literal["natural", "text"]
"""How names of classes are sorted: 2 before 10, or letter by letter."""
