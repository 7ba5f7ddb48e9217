"""An extension of griffe: our docstrings call their doctests `Example:`, and griffe shows those under `Examples:`."""

import re
from typing import Any

from griffe import Extension, Object


class Doctests(Extension):
    """Examples become code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rename the section of every docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
