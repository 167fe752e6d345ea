"""Tools of xLAM-function-calling-60k."""

from collections.abc import Mapping

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets.type_names import flat_schema


def flat_tool(tool: Mapping, place: str) -> dict:
    """Converts a tool whose ``parameters`` are flat: name -> ``{"type": a Python annotation, "description", "default"?,
    "required"?}``; ``flat_schema`` says which are required, and the tool itself may list them in ``required``.

    Raises InputError, beginning with ``place``, for parameters of another form.
    """
    parameters = tool.get("parameters") or {}
    if not isinstance(parameters, Mapping) or not all(isinstance(spec, Mapping) for spec in parameters.values()):
        raise InputError(f"{place}: the parameters of tool {tool.get('name')!r} must map names to their descriptions.")
    return {
        "name": tool.get("name"),
        "description": tool.get("description", ""),
        "parameters": flat_schema(parameters, tool.get("required")),
    }
