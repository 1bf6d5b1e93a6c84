"""What Triton's interpreter needs to run under every pair of versions that is allowed."""

from __future__ import annotations

from typing import Any

import triton.runtime.interpreter as interpreter


def make_one_element_an_index() -> None:
    """Let a tensor of one element be a number of Python, as loops over a range want it.

    Triton before 3.8 makes an ``int`` of an array with an axis of one element, which numpy 2.4 and later refuse.
    """
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched
