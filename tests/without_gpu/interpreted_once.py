"""Triton's interpreter, patching ``triton.language`` once instead of at each launch and each call of a device function,
which takes most of its time. For a process that compiles no kernel."""

import inspect

import triton.language as tl
from triton.runtime import interpreter


class _Kept:
    def restore(self):
        pass


def install() -> None:
    patch, done = interpreter._patch_lang, set()

    def patch_once(fn):
        modules = {value for value in fn.__globals__.values() if inspect.ismodule(value)} & {tl, tl.core}
        if not modules <= done:
            patch(fn)
            done.update(modules)
        return _Kept()

    interpreter._patch_lang = patch_once
