"""Named reward functions: imports of ``module.function`` and ``path/to/file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from toolx_kernels.errors import InputError, did_you_mean, first_line

FORMS = "write module.function or path/to/file.py:function"


def named_rewards(names: Sequence[str]) -> list[Callable]:
    """Imports the functions with these names. A module or file runs once, however often this is called.

    Modules are also found in the working directory, and a file can import others from its folder. Both are searched
    last, so that no file there hides an installed package.

    Raises InputError: a name has neither form, its module or file does not exist or raises when imported, or it does
    not name a function there.
    """
    return [_function(name) for name in names]


def _function(name: str) -> Callable:
    asked = f"reward_funcs={name}"
    where, _, attribute = name.rpartition(":" if ":" in name else ".")
    if "\0" in name or not (where if ":" in name else all(where.split("."))):
        raise InputError(f"{asked} names no module: {FORMS}.")
    if where == "__main__":
        raise InputError(f"{asked} is in the program that runs, which is not imported again: pass the function itself.")
    module = _from_file(where, asked) if ":" in name else _from_module(where, asked)
    if not hasattr(module, attribute):
        functions = [name for name, value in vars(module).items() if _is_function(value)]
        raise InputError(f"{asked}: {where} has no {attribute!r}: {did_you_mean(attribute, functions, f'{FORMS}.')}")
    value = getattr(module, attribute)
    if not _is_function(value):
        what = "a class" if isinstance(value, type) else f"of type {type(value).__name__}"
        raise InputError(f"{asked} is {what}: name a function of prompts, completions and completion_ids.")
    return value


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, type)


def _from_module(module: str, asked: str) -> ModuleType:
    _search(Path.cwd())
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            found = f"modules are those that are installed and those in {Path.cwd()}"
            raise InputError(f"{asked}: there is no module {error.name!r}: {FORMS}; {found}.") from None
        raise _raised(error, asked) from None


def _from_file(file: str, asked: str) -> ModuleType:
    path = Path(file).expanduser().resolve()
    if path.suffix != ".py" or not path.is_file():
        raise InputError(f"{asked}: there is no Python file {file}: {FORMS}.")
    # a name that no import statement can use; without dots, which would make pickle look for a package
    name = f"reward_funcs:{path}".replace(".", ":")
    if name not in sys.modules:
        _search(path.parent)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, Exception | SystemExit):
                raise _raised(error, asked) from None
            raise
    return sys.modules[name]


def _search(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _raised(error: BaseException, asked: str) -> InputError:
    """Names the line of the user's code that raised ``error``."""
    said, remedy = first_line(error), "repair that first"
    if isinstance(error, SyntaxError):
        place, said = f"{error.filename}, line {error.lineno}" if error.filename else "its text", error.msg
    else:
        if isinstance(error, ImportError) and "relative import" in said:
            remedy = "name the function as package.module.function, as a file belongs to no package"
        frames = traceback.extract_tb(error.__traceback__)
        own = (__file__, importlib.__file__)
        users = [frame for frame in frames if frame.filename not in own and not frame.filename.startswith("<frozen")]
        place = f"{users[0].filename}, line {users[0].lineno}" if users else "its import"
    return InputError(f"{asked}: {place}, raised {type(error).__name__} ({said}): {remedy}.")
