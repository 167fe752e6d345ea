"""A single patch of ``triton.language`` for Triton's interpreter, which otherwise patches it at each launch and each
call of a device function and spends most of its time there. For processes that compile no kernel."""

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
